"""Small local models behind an OpenAI-compatible API: python benchmarks/serve.py PORT NAME=MODEL_DIR ...

Answers POST /v1/chat/completions for the models of these names, greedily, what waits for a model in one batch. The
thinking, in s1's format, is given as reasoning_content. Port 0 is any free one; the URL is printed once the models are
there.
"""

import json
import sys
import threading
from concurrent.futures import Future
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from typing import Any

from s1jax.config import GenerateConfig, ModelSection
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.profiles import prepare_prompt
from s1jax.decoding.requests import Request, encode_prompt, problem_of
from s1jax.decoding.results import Finished, Generation
from s1jax.decoding.setup import build_engine, prepare

BATCH = 32


class Model:
    """One model, and a thread that answers what waits for it."""

    def __init__(self, path: str):
        config = GenerateConfig(model=ModelSection(path=path, dtype="float32"), batch_size=BATCH)
        self._setup = prepare(config)
        self._engine = build_engine(config, self._setup, BATCH)
        self._waiting: Queue[tuple[Request, Future[Generation]]] = Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> Generation:
        """Wait for the answer, of at most so many tokens. Raises ValueError for a prompt that leaves no room."""
        encoded = encode_prompt(messages, self._setup.tokenizer, True)
        prompt = prepare_prompt(encoded.input_ids, self._setup.profile, encoded.after_user)
        answer = max(1, max_tokens // 4)
        budget = ThinkingBudget(
            max_answer_tokens=answer,
            max_thinking_tokens=max_tokens - answer,
            max_total_tokens=self._setup.context_length,
        )
        request = Request(prompt, budget, 0)
        problem = problem_of(request, self._setup.profile, self._setup.context_length)
        if problem:
            raise ValueError(problem)
        future: Future[Generation] = Future()
        self._waiting.put((request, future))
        return future.result()

    def _work(self) -> None:
        while True:
            jobs = [self._waiting.get()]
            while len(jobs) < BATCH:
                try:
                    # So long that the questions asked at once are answered at once.
                    jobs.append(self._waiting.get(timeout=0.1))
                except Empty:
                    break
            futures = {id(request): future for request, future in jobs}
            try:
                for event in self._engine.run([request for request, _ in jobs]):
                    if isinstance(event, Finished):
                        futures[id(event.request)].set_result(event.generation)
            except RuntimeError as error:
                for future in futures.values():
                    if not future.done():
                        future.set_exception(error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, models: dict[str, Model], *arguments: Any):
        self._models = models
        super().__init__(*arguments)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = self._models.get(body["model"])
        if self.path != "/v1/chat/completions" or model is None:
            self._send(404, {"error": {"message": f"there is no model {body['model']!r} at {self.path}"}})
            return
        try:
            self._send(200, _completion(model.answer(body["messages"], body["max_tokens"])))
        except ValueError as error:
            self._send(400, {"error": {"message": str(error)}})
        except RuntimeError as error:
            self._send(500, {"error": {"message": str(error)}})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def _completion(generation: Generation) -> dict[str, Any]:
    message = {"role": "assistant", "content": generation.answer, "reasoning_content": generation.thinking}
    end = "stop" if generation.finish_reason == "stop" else "length"
    usage = {"prompt_tokens": len(generation.prompt_ids), "completion_tokens": len(generation.output_ids)}
    return {
        "id": "0",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": end}],
        "usage": usage,
    }


def main(port: str, *models: str) -> None:
    named = {name: Model(path) for name, _, path in (word.partition("=") for word in models)}
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), partial(Handler, named))
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
