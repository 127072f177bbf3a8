"""A local OpenAI-compatible server that answers well, or badly by a script, and counts what it was asked."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TRANSIENT = ("429", "429 date", "500", "503", "timeout", "drop", "half")
"""Faults of the way to an answer; `half` breaks off in the middle of a body of known length."""
RUBBISH = ("half JSON", "schema", "no choices", "empty", "HTML", "list", "surrogate", "deep", "error in 200", "usage")
FINAL = ("400", "cut")
FATAL = ("401", "402", "403", "404", "no quota")
PROMPT_TOKENS, ANSWER_TOKENS = 10, 20


def good(content: str) -> dict[str, Any]:
    """A message with trace and answer."""
    return {"role": "assistant", "content": f"The answer to {content}", "reasoning_content": f"Thinking of {content}"}


class Server(ThreadingHTTPServer):
    """Faults of a question are used up one for each request; then it is answered by `reply`.

    A question is known by the first line of the last message that has the word "question", else the first line.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Callable[[str], dict[str, Any]] = good):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.faults: dict[str, list[str]] = {}
        self.key: str | None = None
        """The only one that is let in; None: any."""
        self.location: str | None = None
        """Where answers with a status of 3xx redirect to."""
        self.echo = False
        """Repeat the Authorization header in all bodies and in a header."""
        self.usage = True
        self.delay = 0.0
        self.retry_after = "0"
        self.hang = 3.0
        """Seconds that a request is left without an answer by the fault "timeout"."""
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.billed = 0
        """Answers sent whole, or in part."""
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        question = content.partition("<question>\n")[2] or content
        question = question.partition("\n")[0]
        with server.lock:
            server.asked[question] += 1
            server.bodies.append(body)
            server.times.setdefault(question, []).append(time.monotonic())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            faults = server.faults.get(question)
            fault = faults.pop(0) if faults else "good"
        try:
            time.sleep(server.delay)
            if self.path != "/v1/chat/completions":
                fault = "404"
            elif server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                fault = "401"
            self._answer(fault, question, content)
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, fault: str, question: str, content: str) -> None:
        status, message, text, cut = 200, self.server.reply(content), None, False
        usage: Any = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS}
        match fault:
            case "timeout":
                time.sleep(self.server.hang)
                self.close_connection = True
                return
            case "drop":
                self.close_connection = True
                return
            case "HTML":
                text = "<html><body>Bad gateway" + self._echoed() + "</body></html>"
            case "list":
                text = "[1, 2]"
            case "schema":
                text = json.dumps({"choices": [{"text": self._echoed()}], "usage": usage})
            case "no choices":
                text = json.dumps({"choices": [], "usage": usage})
            case "usage":
                text = json.dumps({"choices": "none", "usage": {"prompt_tokens": -1, "completion_tokens": 10**400}})
            case "error in 200":
                text = json.dumps({"error": {"message": "overloaded" + self._echoed()}})
            case "empty":
                message = {"role": "assistant", "content": " ", "reasoning_content": ""}
            case "surrogate":
                text = '{"choices": [{"message": {"content": "\\ud800", "reasoning_content": "a"}}]}'
            case "deep":
                choice = {"message": message, "finish_reason": "stop"}
                text = json.dumps({"choices": [choice], "usage": usage})[:-1] + f', "x": {"[" * 900}{"]" * 900}}}'
            case "cut":
                cut = True
            case "no quota":
                status, text = 429, json.dumps({"error": {"code": "insufficient_quota", "message": "no money"}})
            case "429 date":
                status = 429
            case "good" | "drip" | "half" | "half JSON":
                pass
            case _:
                status = int(fault)
        if text is None and status != 200:
            text = json.dumps({"error": {"message": f"it is {status}" + self._echoed()}})
        if text is None:
            choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
            answer = {"id": "a", "object": "chat.completion", "choices": [choice], "echo": self._echoed()}
            text = json.dumps(answer | ({"usage": usage} if self.server.usage else {}))
        data = text.encode()
        if fault == "half JSON":
            data = data[: len(data) // 2]
        with self.server.lock:
            self.server.billed += status == 200
            self.server.answered[question] += fault in ("good", "cut")
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if fault == "HTML" else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.server.echo:
            self.send_header("x-request-id", self._echoed())
        if self.server.location:
            self.send_header("Location", self.server.location)
        if fault == "429":
            self.send_header("Retry-After", self.server.retry_after)
        elif fault == "429 date":
            self.send_header("Retry-After", formatdate(time.time() + float(self.server.retry_after), usegmt=True))
        self.end_headers()
        if fault == "drip":
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            return
        self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        self.close_connection = fault == "half"

    def _echoed(self) -> str:
        return f" you sent {self.headers['Authorization']}" if self.server.echo else ""

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def serving(
    faults: Mapping[str, Sequence[str]] | None = None, reply: Callable[[str], dict[str, Any]] = good
) -> Iterator[Server]:
    """A server at work."""
    server = Server(reply)
    server.faults = {question: list(of_question) for question, of_question in (faults or {}).items()}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
