"""What clients, keys, signals and templates do wrong, and what the server makes of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import QUESTION, ROOT, Server, memory, running

LONG: Any = {"messages": QUESTION, "stream": True, "min_thinking_tokens": 400, "max_answer_tokens": 5}
SHORT: Any = {"messages": QUESTION, "thinking_budget": 3, "max_answer_tokens": 2}
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
JSON_TYPE = {"content-type": "application/json"}


def connect(server: Server) -> socket.socket:
    """A connection on which nothing has been said yet."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes, or resets what it has not read."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def works(server: Server) -> bool:
    """Whether it answers as ever."""
    with server.client as client:
        return client.post(CHAT, json=SHORT).status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe\x00", 400),
        (b"[" * 100_000, 400),
        (b'{"messages": NaN}', 400),
        (b'{"n": 1, "n": 2}', 400),
        (b"null", 400),
        (b'{"messages": []}', 400),
    ],
)
def test_what_is_no_request_is_refused(server: Server, content: bytes, status: int) -> None:
    with server.client as client:
        answer = client.post(CHAT, content=content, headers=JSON_TYPE)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
        assert client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        assert client.get("/v1/nothing").status_code == 404
    assert works(server)


def test_a_body_of_a_hundred_megabytes_is_refused_and_not_kept(server: Server) -> None:
    assert works(server)
    before = memory(server)
    with connect(server) as connection:
        connection.sendall(HEAD.encode() + b"content-length: 100000000\r\n\r\n")
        for _ in range(90):
            connection.sendall(b" " * 1_000_000)
        # The answer is there before all of it was sent.
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    assert memory(server) - before < 30 * 1024
    with server.client as client:
        answer = client.post(CHAT, content=b" " * 5_000_000, headers=JSON_TYPE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert works(server)


@pytest.mark.slow
def test_slow_clients_are_left_and_others_are_answered(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log", ["server.receive_seconds=1.5"]) as server:
        silent, body, head = connect(server), connect(server), connect(server)
        body.sendall(HEAD.encode() + b"content-length: 100\r\n\r\n{")
        started = time.monotonic()
        assert works(server)
        # It may be closed already: that is what is asked for.
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(4):
                head.sendall(b"G")
                time.sleep(0.2)
        assert received(silent) == b""
        assert received(head) == b""
        assert b"408" in received(body)
        assert time.monotonic() - started < 25
        # A reader who takes nothing is not waited for either.
        deaf = connect(server)
        request = json.dumps({**LONG, "n": 2}).encode()
        deaf.sendall(HEAD.encode() + f"content-length: {len(request)}\r\n\r\n".encode() + request)
        assert works(server)
        for connection in (silent, body, head, deaf):
            connection.close()


@pytest.mark.slow
def test_more_connections_than_it_has_are_refused_in_order(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log", ["server.max_connections=500", "server.receive_seconds=60"]) as server:
        command = [sys.executable, "-c", MANY_CONNECTIONS, *server.url.removeprefix("http://").split(":")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["500", "9500"]
        assert works(server)


MANY_CONNECTIONS = """
import resource, select, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
opened, refused = [], 0
for _ in range(10_000):
    opened.append(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60))
# The first 500 are open and silent; all after them are told that there are too many, and closed.
for number, connection in enumerate(opened):
    if number < 500:
        assert not select.select([connection], [], [], 0)[0], number
    else:
        said = b""
        while part := connection.recv(4096):
            said += part
        assert said.startswith(b"HTTP/1.1 503") and b"retry-after" in said, (number, said)
        refused += 1
print(len(opened) - refused, refused)
"""


@pytest.mark.slow
def test_more_answers_than_may_wait_are_refused_and_come_later(model: Path, tmp_path: Path) -> None:
    words = ["server.max_waiting=16", "server.steps=1"]
    with running(model, tmp_path / "log", words) as server, server.client as client:
        # Four rows: most of the first sixteen wait.
        with client.stream("POST", CHAT, json={**LONG, "n": 16}) as first:
            # Kept: the client closes a stream with the last iterator of it.
            lines = first.iter_lines()
            next(lines)
            full = client.post(CHAT, json={**SHORT, "n": 16})
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) > 0
        assert client.post(CHAT, json={**SHORT, "n": 16}).status_code == 200
        assert client.post(CHAT, json={**SHORT, "n": 17}).status_code == 400


@pytest.mark.slow
def test_killed_while_streaming_and_started_again(model: Path, tmp_path: Path) -> None:
    with running(model, tmp_path / "log") as server, server.client as client:
        port = server.url.rpartition(":")[2]
        with client.stream("POST", CHAT, json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                assert "[DONE]" not in "".join(lines)
        # At once, and at the same port.
        with running(model, tmp_path / "again", [f"server.port={port}"]) as again:
            assert again.url == server.url
            assert works(again)


@pytest.mark.slow
@pytest.mark.parametrize(("drain", "finishes"), [(60, True), (1, False)])
def test_told_to_stop_it_finishes_what_it_has(model: Path, tmp_path: Path, drain: int, *, finishes: bool) -> None:
    words = [f"server.drain_seconds={drain}", "server.steps=1"]
    with running(model, tmp_path / "log", words) as server, server.client as client:
        asked = LONG if finishes else {**LONG, "n": 16}
        with client.stream("POST", CHAT, json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            with pytest.raises(OSError, match="refused"):
                connect(server)
            try:
                ended = "[DONE]" in "".join(lines)
            except httpx.HTTPError:
                ended = False
        assert ended or not finishes
        server.process.wait(30)
        assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_key_is_wanted_where_others_can_come_from_and_is_not_logged(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "decode.py", "serve", f"model.path={model}", "server.port=0", "server.host=0.0.0.0"]
    bare = {name: value for name, value in os.environ.items() if name != "S1JAX_API_KEY"}
    refused = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: server.host: 0.0.0.0 is not loopback")
    with running(model, tmp_path / "log", S1JAX_API_KEY="open sesame") as server, server.client as client:
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer open"}).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer open sesame"}).status_code == 200
        assert client.post(CHAT, json=SHORT).status_code == 401
        with_key = {"authorization": "Bearer open sesame"}
        assert client.post(CHAT, json=SHORT, headers=with_key).status_code == 200
        assert client.get("/health").status_code == 200
        log = server.log.read_text()
        assert "sesame" not in log
        assert "apples" not in log


@pytest.mark.slow
def test_a_template_that_raises_is_the_requests_fault(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    template = (copy / "chat_template.jinja").read_text()
    rule = "{% if 'forbidden' in messages[0].content %}{{ raise_exception('not this word') }}{% endif %}"
    (copy / "chat_template.jinja").write_text(rule + template)
    with running(copy, tmp_path / "log", ["server.log_prompts=true"]) as server, server.client as client:
        refused = client.post(CHAT, json={"messages": [{"role": "user", "content": "forbidden"}]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert "not this word" in refused.json()["error"]["message"]
        assert client.post(CHAT, json=SHORT).status_code == 200
        assert "apples" in server.log.read_text()
