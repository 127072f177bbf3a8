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
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.engine import Engine
from s1jax.decoding.hosts import start_hosts
from s1jax.decoding.profiles import prepare_prompt
from s1jax.decoding.requests import Request
from s1jax.decoding.sampling import GREEDY, Sampling
from s1jax.decoding.setup import Setup, engine_of, prepare
from s1jax.model.load import load_model
from s1jax.serving.app import Service
from s1jax.serving.asks import Reader
from s1jax.serving.connections import bounded_protocol
from s1jax.serving.metrics import Metrics
from s1jax.serving.worker import Worker

KEY_VARIABLE = "S1JAX_API_KEY"
_TOP_K = 64
"""Requests with a greater one have the loop compiled again."""
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
    build = partial(engine_of, loaded, config, setup, logprobs=True, steps_per_chunk=section.steps)
    engine = build()
    _log(f"compiling the loop for {engine.batch_size} rows")
    warm_up(engine, setup, min(reader.longest, config.cache.tokens or reader.longest))
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


def warm_up(engine: Engine, setup: Setup, longest: int) -> None:
    """Compile what most requests need, and have a cache for requests of up to so many tokens.

    Raises ValueError or OutOfMemoryError where there is no room for one of them.
    """
    prompt = prepare_prompt([setup.profile.eos[0]], setup.profile)
    budget = ThinkingBudget(max_total_tokens=longest)
    everything = Sampling(temperature=1.0, top_p=0.9, min_p=0.1)
    for samplings in ((GREEDY,), (everything, Sampling(temperature=1.0, top_k=_TOP_K))):
        requests = [Request(prompt, budget, 0, sampling=sampling) for sampling in samplings]
        for request in requests:
            engine.submit(request)
        while not engine.is_idle and not engine.step():
            pass
        for request in requests:
            engine.cancel(request)
        while not engine.is_idle:
            engine.step()


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
