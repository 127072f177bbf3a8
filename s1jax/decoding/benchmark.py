"""How fast prefill and decoding are, against how fast this device copies memory."""

import json
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s1jax.config import BenchmarkConfig
from s1jax.config_reader import ConfigError, to_dict
from s1jax.decoding.budget import Phase, RowParams, RowState, Tables
from s1jax.decoding.engine import STEPS_PER_CHUNK
from s1jax.decoding.hosts import Hosts, Row, SharedOutput, same_command, start_hosts
from s1jax.decoding.loop import Rows, Shared, decode_chunk, empty_cache, prefill
from s1jax.decoding.pages import full_table
from s1jax.decoding.prefill_queue import PIECE
from s1jax.decoding.sampling import Draws, sampling_params
from s1jax.decoding.workload import picture, run_workload
from s1jax.device_memory import peak_resident_bytes
from s1jax.mesh import batch_shards, divisible_rows
from s1jax.model import cpu_kernel
from s1jax.model.hf_files import resolve_model
from s1jax.model.load import LoadedModel, inference_model, read_params
from s1jax.model.paged_attention import PAGE, KVCache, num_pages
from s1jax.paths import AnyPath, any_path, write_whole

_COPIED_BYTES = 2**29
_UNLIMITED = 2**30
_RATES = {
    "results": ("prefill_tokens_per_second", "decode_tokens_per_second"),
    "workloads": ("requests", "tokens_per_second"),
}
"""Of a report, what all processes together have the sums of."""


@dataclass(frozen=True)
class Measurement:
    """One batch size; times are medians."""

    batch_size: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    milliseconds_per_step: float
    seconds_to_first_token: float
    """Prefill of the whole batch and one step."""
    compile_seconds: float
    """First run of every program less a later one; short where they came from the compilation cache."""
    bytes_per_step: int
    """Weights and filled cache, read once."""
    bandwidth_share: float
    """Bytes per step over step time, as a share of the measured copy."""
    peak_memory_bytes: int
    """Of the device where it tells, else of this process."""


def benchmark(config: BenchmarkConfig) -> None:
    """Measure, print a table and write `benchmark.output`. Random weights are used where the directory has none.

    Where several processes have copies, each measures its own, and `benchmark.output` has the figures of all.
    """
    hosts = start_hosts(config.mesh)
    same_command(config, hosts, None)
    if config.benchmark.rate and hosts.processes.count > 1 and not hosts.copies:
        raise ConfigError("benchmark.rate: processes of one model have no clock together: leave it out, or use copies")
    output = any_path(config.benchmark.output) if config.benchmark.output else None
    if hosts.copies and output:
        with SharedOutput(output.with_name(output.name + ".hosts"), hosts) as shared:
            _measure_copy(config, hosts, shared, output)
        return
    report = _measured(config)
    if hosts.writes:
        print(_table(report))
        if output:
            write_whole(output, json.dumps(report, indent=2) + "\n")
            _draw(report, output.with_name(f"{Path(output.name).stem}.png"))


def _draw(report: Row, path: AnyPath) -> None:
    """The picture of a report's workloads, if it has any."""
    if report["workloads"]:
        write_whole(path, picture(report["workloads"]))


def _measure_copy(config: BenchmarkConfig, hosts: Hosts, shared: SharedOutput, output: AnyPath) -> None:
    """Measure this process's copy; the last of all processes writes the output."""
    settings = to_dict(config)
    del settings["mesh"], settings["benchmark"]["output"]

    def key(row: Row) -> tuple[Any, ...]:
        return row["process"], row["processes"], json.dumps(row["settings"])

    processes = range(hosts.processes.count)
    rows = [{"process": process, "processes": len(processes), "settings": settings} for process in processes]
    wanted, mine = list(map(key, rows)), rows[hosts.processes.index]
    if key(mine) not in map(key, shared.rows()):
        report = _measured(config)
        print(_table(report))
        shared.append([{**mine, "report": report}])
    with shared.merged(lambda written: len(set(wanted) - set(map(key, written))), key, order=key) as last:
        if last:
            _write_all([row["report"] for row in shared.rows() if key(row) in wanted], output)
            shared.path.unlink()


def _write_all(reports: list[Row], output: AnyPath) -> None:
    """The report of all processes together."""
    sums = {key: _sums(reports, key, rates) for key, rates in _RATES.items()}
    for row in (*sums["results"], *sums["workloads"]):
        print("all hosts: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()))
    write_whole(output, json.dumps({**sums, "hosts": reports}, indent=2) + "\n")
    for process, report in enumerate(reports):
        _draw(report, output.with_name(f"{Path(output.name).stem}.{process}.png"))


def _sums(reports: list[Row], key: str, rates: tuple[str, ...]) -> list[Row]:
    """The rates of all processes together, for each batch size."""
    return [
        {name: sum(result[name] for result in results) for name in ("batch_size", *rates)}
        for results in zip(*(report[key] for report in reports), strict=True)
    ]


def _measured(config: BenchmarkConfig) -> Row:
    directory = resolve_model(config.model.path)
    has_weights = any(file.suffix == ".safetensors" for file in directory.iterdir())
    if config.model.adapter and not has_weights:
        raise ConfigError(
            f"model.adapter: {directory} has no weights that it could be merged into, random ones are taken"
        )
    as_computed = replace(config.model, param_dtype=config.model.param_dtype or config.model.dtype)
    model, mesh = inference_model(
        config.model if has_weights else as_computed, config.mesh, directory, config.cache.dtype
    )
    with jax.set_mesh(mesh):
        if has_weights:
            params = read_params(config.model, directory, model, mesh)
        else:
            params = jax.jit(model.unstack)(model.init(jax.random.key(0), mesh))
        loaded = LoadedModel(model, params, mesh, directory)
        copy = _copy_bytes_per_second()
        vector_bytes = cpu_kernel.vector_bytes()
        units = "matrix units" if cpu_kernel.has_tiles() else "vectors" if cpu_kernel.has_pairs() else None
        results = [_measure(loaded, config, size, copy) for size in config.benchmark.batch_sizes]
    sizes = config.benchmark.batch_sizes if config.benchmark.requests else ()
    workloads = [asdict(run_workload(loaded, config.benchmark, size)) for size in sizes]
    return {
        "host": socket.gethostname(),
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "cpu_vector_bytes": vector_bytes,
        "cpu_multiplies_bfloat16_by": units,
        "jax": jax.__version__,
        "dtype": config.model.dtype,
        "weights": "checkpoint" if has_weights else "random",
        "quantisation": model.quantisation,
        "cache_dtype": config.cache.dtype,
        "prompt_length": config.benchmark.prompt_length,
        "new_tokens": config.benchmark.new_tokens,
        "copy_bytes_per_second": copy,
        "results": [asdict(result) for result in results],
        "workloads": workloads,
    }


def _measure(loaded: LoadedModel, config: BenchmarkConfig, batch_size: int, copy: float) -> Measurement:
    section, model = config.benchmark, loaded.model
    shards = batch_shards(loaded.mesh)
    batch = divisible_rows(batch_size, loaded.mesh)
    total = section.prompt_length + section.new_tokens
    per_row = num_pages(total + STEPS_PER_CHUNK)
    table = full_table(shards, batch, per_row)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, section.prompt_length).astype(np.int32)
    shared, rows = unending_rows(model.config.vocab_size, batch, section.prompt_length)

    def fill() -> KVCache:
        cache = empty_cache(model, shards + batch * per_row)
        for of_shards in np.swapaxes(table.reshape(shards, -1, per_row), 0, 1):
            for first in range(0, len(prompt), PIECE):
                piece = np.tile(prompt[first : first + PIECE], (shards, 1))
                own = of_shards if first else of_shards[:, : num_pages(piece.shape[1])]
                cache = prefill(model, loaded.params, cache, piece, np.full(shards, first, np.int32), own)
        return jax.block_until_ready(cache)

    def decode(cache: KVCache, rows: Rows, steps: int) -> tuple[KVCache, Rows]:
        cache, state, last_token, _ = decode_chunk(
            model, Draws(greedy=True), steps, False, loaded.params, shared, cache, table, rows
        )
        return jax.block_until_ready((cache, rows._replace(state=state, last_token=last_token)))

    first_runs = _seconds(lambda: decode(decode(fill(), rows, 1)[0], rows, STEPS_PER_CHUNK))
    later_runs = _seconds(lambda: decode(decode(fill(), rows, 1)[0], rows, STEPS_PER_CHUNK))
    prefills, firsts, steps = [], [], []
    for _ in range(section.repeats):
        prefills.append(_seconds(fill))
        firsts.append(_seconds(lambda: decode(fill(), rows, 1)))
        cache, at = fill(), rows
        started = time.perf_counter()
        chunks = -(-section.new_tokens // STEPS_PER_CHUNK)
        for _ in range(chunks):
            cache, at = decode(cache, at, STEPS_PER_CHUNK)
        steps.append((time.perf_counter() - started) / (chunks * STEPS_PER_CHUNK))
    step = statistics.median(steps)
    weights = sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    if not model.config.tie_word_embeddings:
        # Only one row of it is read for each token.
        weights -= sum(x.nbytes for x in jax.tree.leaves(loaded.params["embedding"]))
    filled = (section.prompt_length + total) / 2 / (per_row * PAGE)
    bytes_per_step = int(weights + filled * sum(x.nbytes for x in jax.tree.leaves(cache)))
    return Measurement(
        batch_size=batch,
        prefill_tokens_per_second=batch * section.prompt_length / statistics.median(prefills),
        decode_tokens_per_second=batch / step,
        milliseconds_per_step=1e3 * step,
        seconds_to_first_token=statistics.median(firsts),
        compile_seconds=max(0.0, first_runs - later_runs),
        bytes_per_step=bytes_per_step,
        bandwidth_share=bytes_per_step / step / copy,
        peak_memory_bytes=_peak_memory(),
    )


def unending_rows(vocab_size: int, batch: int, length: int) -> tuple[Shared, Rows]:
    """Rows with contexts of this length that answer greedily and never stop: no token is an eos."""
    none = jnp.zeros(vocab_size, bool)
    tables = Tables(jnp.zeros((3, 1), jnp.int32), jnp.zeros(3, jnp.int32), none, none, none)
    zeros = np.zeros(batch, np.int32)
    state = RowState(*([zeros] * len(RowState._fields)))._replace(
        phase=np.full(batch, Phase.ANSWERING, np.int32),
        length=np.full(batch, length, np.int32),
        text=np.full(batch, -1, np.int32),
        mask_end=zeros > 0,
        ends_in_newline=zeros > 0,
    )
    limits = RowParams(*([np.full(batch, _UNLIMITED, np.int32)] * len(RowParams._fields)))
    limits = limits._replace(wait_start=zeros)
    rows = Rows(state, limits, zeros, sampling_params([], batch), np.zeros((batch, 2), np.uint32))
    return Shared(tables, ~none, jnp.zeros(1, jnp.int32)), rows


def _copy_bytes_per_second() -> float:
    """Bytes read and written by a copy of half a GiB onto itself, per second, the best of five."""
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    # In place: a CPU takes longer to find new memory than to fill it.
    array = jax.block_until_ready(copy(jnp.zeros(_COPIED_BYTES // 4, jnp.float32)))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        array = jax.block_until_ready(copy(array))
        seconds.append(time.perf_counter() - started)
    return 2 * _COPIED_BYTES / min(seconds)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _peak_memory() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or peak_resident_bytes())


def _table(report: Row) -> str:
    vectors, units = report["cpu_vector_bytes"], report["cpu_multiplies_bfloat16_by"]
    quantised = f" in {report['quantisation']}" if report["quantisation"] else ""
    lines = [
        f"{report['devices']} x {report['device']}, {report['dtype']}, {report['weights']} weights{quantised}, "
        f"prompts of {report['prompt_length']}, {report['new_tokens']} new tokens; "
        f"copy {report['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        + (f"; kernels for the CPU in vectors of {vectors} bytes" if vectors else "")
        + (f", bfloat16 multiplied by its {units}" if units else ""),
        "batch  prefill tok/s  decode tok/s  ms/step  first token s  compile s  bandwidth  peak GiB",
    ]
    for result in report["results"]:
        r = Measurement(**result)
        lines.append(
            f"{r.batch_size:5}  {r.prefill_tokens_per_second:13.1f}  {r.decode_tokens_per_second:12.1f}  "
            f"{r.milliseconds_per_step:7.1f}  {r.seconds_to_first_token:13.2f}  {r.compile_seconds:9.1f}  "
            f"{r.bandwidth_share:9.2f}  {r.peak_memory_bytes / 2**30:8.2f}"
        )
    if report["workloads"]:
        lines.append("batch  requests  tok/s  first token s, p50 / p90 / p99  ms a token, p50 / p90 / p99")
    for w in report["workloads"]:
        first = " / ".join(f"{seconds:.2f}" for seconds in w["first_token_seconds"].values())
        each = " / ".join(f"{1e3 * seconds:.1f}" for seconds in w["seconds_per_token"].values())
        lines.append(f"{w['batch_size']:5}  {w['requests']:8}  {w['tokens_per_second']:5.1f}  {first:>30}  {each:>27}")
    return "\n".join(lines)
