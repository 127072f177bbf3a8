"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from s1jax.decoding.cache import Occupancy

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"s1jax_{name}", text, registry=self._registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"s1jax_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"s1jax_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)

        self._waiting = gauge("answers_waiting", "Answers that wait for a row")
        self._rows = gauge("rows_at_work", "Rows of the batch that decode")
        self._live_tokens = gauge("live_tokens", "Tokens in the contexts of these rows")
        self._used_pages = gauge("pages_used", "Pages of the cache in use")
        self._pages = gauge("pages", "Pages of the cache")
        self.requests = counter("requests", "Requests answered, by HTTP status", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.output_tokens = counter("output_tokens", "Tokens of outputs; its rate is tokens per second")
        self.thinking_tokens = counter("thinking_tokens", "Tokens of outputs that are thinking")
        self.forced_ends = counter("forced_ends", "Ends of thinking that the budget or the context forced")
        self.waits = counter("waits", "Ends of thinking that were replaced by a wait text")
        self.cut_off = counter("requests_cut_off", "Requests whose client went away")
        self.first_token_seconds = histogram("first_token", "From a request to its first token")
        self.request_seconds = histogram("request", "From a request to the end of its answer")

    def watch(self, waiting: int, occupancy: Occupancy) -> None:
        """Take what a worker tells after a chunk."""
        self._waiting.set(waiting)
        self._rows.set(occupancy.rows)
        self._live_tokens.set(occupancy.live_tokens)
        self._used_pages.set(occupancy.used_pages)
        self._pages.set(occupancy.pages)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
