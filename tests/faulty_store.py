"""A store that sometimes refuses: a server on loopback that passes requests on, but for those that a rule picks."""

import http.client
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Rule = Callable[[str, str], int | None]
"""From a request's method and unquoted path to the status that it is refused with. Of an upload of which only the body
says what it is to be called, that name follows the path."""
_CODES = {403: "AccessDenied", 503: "SlowDown"}
_HOP = {"transfer-encoding", "connection", "content-length"}


def _name_in(path: str, body: bytes) -> str:
    found = re.search(rb'"name": ?"([^"]+)"', body[:4096]) if "uploadType=multipart" in path else None
    return f" {found[1].decode()}" if found else ""


@contextmanager
def refusing(settings: Mapping[str, str], rule: Rule) -> Iterator[dict[str, str]]:
    """The environment of `tests.buckets` with a server before the store that refuses what the rule says."""
    upstream = next(value for value in settings.values() if value.startswith("http://"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._chunks()
            status = rule(self.command, urllib.parse.unquote(self.path) + _name_in(self.path, body))
            if status:
                content = f"<Error><Code>{_CODES[status]}</Code><Message>refused by the test</Message></Error>".encode()
                return self._send(status, {"Content-Type": "application/xml"}, content)
            connection = http.client.HTTPConnection(upstream.removeprefix("http://"), timeout=60)
            headers = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            kept = {key: value for key, value in response.getheaders() if key.lower() not in _HOP}
            if self.command == "HEAD":
                kept["Content-Length"] = response.getheader("Content-Length", "0")
            self._send(response.status, kept, content)
            connection.close()
            return None

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = answer  # noqa: N815

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                with suppress(ConnectionError):  # a client that was killed or that has seen enough
                    self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {key: address if value == upstream else value for key, value in settings.items()}
    finally:
        server.shutdown()
        server.server_close()
