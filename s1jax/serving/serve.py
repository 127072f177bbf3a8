"""python decode.py serve: from a configuration to a server that answers until it is told to stop."""

import ipaddress
import os
import socket
import sys
import time
from functools import partial
from pathlib import PurePath

import uvicorn

from s1jax.config import ServeConfig
from s1jax.config_reader import ConfigError
from s1jax.decoding.hosts import start_hosts
from s1jax.decoding.sampling import Draws
from s1jax.decoding.setup import engine_of, prepare
from s1jax.model.load import load_model
from s1jax.serving.app import Service
from s1jax.serving.asks import Reader
from s1jax.serving.connections import bounded_protocol
from s1jax.serving.metrics import Metrics
from s1jax.serving.worker import Worker

KEY_VARIABLE = "S1JAX_API_KEY"
_DRAWS = Draws(greedy=True, whole=True, candidates=64, top_p=True, min_p=True)
"""What requests may ask for without having the loop compiled again: any sampling but a greater top_k."""
_STEPS = {"cpu": 2}
"""Of a chunk, where it is not 8: each takes the time of many of an accelerator's."""
_KEEP_ALIVE_SECONDS = 30


def serve(config: ServeConfig) -> None:
    """Answer requests until SIGTERM or SIGINT, after which those at work may finish.

    Everything is checked before the weights are read. Raises ConfigError, ValueError, OSError or a subclass with a
    message for the person who started it.
    """
    section = config.server
    if start_hosts(config.mesh).processes.count > 1:
        raise ConfigError("serve: a server is one process on one host; start one on each, and a proxy before them")
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and not _is_loopback(section.host):
        raise ConfigError(f"server.host: {section.host} is not loopback: give a key in the environment, {KEY_VARIABLE}")
    setup = prepare(config)
    reader = Reader(config, setup)
    listening = _listen(section.host, section.port)
    loaded = load_model(config.model, config.mesh, config.cache.dtype)
    steps = section.steps or _STEPS.get(loaded.mesh.devices.flat[0].platform, 8)
    build = partial(engine_of, loaded, config, setup, logprobs=True, steps_per_chunk=steps)
    engine = build()
    _log(f"compiling the loop for {engine.batch_size} rows")
    engine.compile(_DRAWS, min(reader.longest, config.cache.tokens or reader.longest))
    metrics = Metrics()
    worker = Worker(engine, build, section.max_waiting, metrics.watch)
    model = section.name or PurePath(config.model.path).name
    service = Service(section, model, setup, reader, worker, metrics, key, _log)
    server = uvicorn.Server(
        uvicorn.Config(
            service.app(),
            http=bounded_protocol(section.max_connections, section.receive_seconds),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(section.drain_seconds)),
        )
    )
    # Who reads the line below may connect at once.
    listening.listen()
    host, port = listening.getsockname()[:2]
    _log(f"serving {model} at http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        server.run(sockets=[listening])
    finally:
        worker.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError, with the address in its message."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(f"server.host and port: cannot listen at {host}:{port}: {error.strerror}") from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
