"""A proxy between a client and a server on loopback, which answers some requests with an error or not at all."""

import http.client
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = int | str | None
"""A status to answer with; "lost": no answer, and the server sees nothing; "unheard": no answer, though the server has
done what was asked; None: no fault."""
_NOT_FORWARDED = ("transfer-encoding", "connection", "content-length", "host", "expect")


@contextmanager
def faulty(address: str, fault: Callable[[int, str, str], Fault]) -> Iterator[str]:
    """The address of a proxy of the server at `address`; `fault` gets a request's number, from 0, method and path."""
    numbers = itertools.count()
    upstream = urlsplit(address).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self._body()
            found = fault(next(numbers), self.command, self.path)
            if found == "lost":
                self.close_connection = True
                return
            if isinstance(found, int):
                self._answer(found, [], b"")
                return
            server = http.client.HTTPConnection(upstream, timeout=60)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _NOT_FORWARDED}
                server.request(self.command, self.path, body, headers)
                response = server.getresponse()
                content = response.read()
            finally:
                server.close()
            if found == "unheard":
                self.close_connection = True
                return
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(response.status, response.getheaders(), content, length)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = forward  # noqa: N815  # The library's names.

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in _NOT_FORWARDED:
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
