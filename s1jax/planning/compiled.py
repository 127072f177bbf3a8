"""Programs compiled for hardware that is not here: what a plan reads of them, kept on disk for the next plan.

jax's own cache of compiled programs does not serve: they cannot be loaded where their hardware is not.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import zlib
from dataclasses import asdict, dataclass
from typing import Any

from jax.stages import Lowered

from s1jax.compilation_cache import user_cache
from s1jax.compiling import NoRoomError, compile_within_memory, temporaries
from s1jax.paths import write_whole
from s1jax.planning.hardware import PlanError, Target


@dataclass(frozen=True)
class CompiledProgram:
    """What the compiler says of a program; bytes are those of one device."""

    text: str
    """Its HLO."""
    temporaries: int
    """Bytes beside its arguments, as `s1jax.compiling.temporaries` counts them."""
    on_host: int
    """Bytes of temporaries in the host's memory."""
    xla_bytes: float | None
    """All that it accesses as XLA counts it, where it does."""


def compile_for(target: Target, lowered: Lowered, what: str) -> CompiledProgram:
    """Compile `what` for devices of the target, or read what came of it before.

    Raises PlanError if the compiler finds no room for it.
    """
    path = user_cache().with_name("planned") / f"{_key(target, lowered)}.json.zlib"
    # Of another version, or damaged, or not there.
    with contextlib.suppress(OSError, ValueError, TypeError, zlib.error):
        return CompiledProgram(**json.loads(zlib.decompress(path.read_bytes())))
    try:
        compiled = compile_within_memory(lowered)
    except NoRoomError as error:
        raise PlanError(f"{what} do not fit {target}: {error}") from None
    analysis: Any = compiled.memory_analysis()
    program = CompiledProgram(
        text=compiled.as_text() or "",
        temporaries=temporaries(compiled, target.hardware.platform),
        on_host=int(analysis.host_temp_size_in_bytes),
        xla_bytes=(compiled.cost_analysis() or {}).get("bytes accessed"),
    )
    # A disk that is full or may not be written costs the next plan its time, not this one its result.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, zlib.compress(json.dumps(asdict(program)).encode()))
    return program


def _key(target: Target, lowered: Lowered) -> str:
    """A digest of all that a compiled program depends on."""
    compilers = sorted(
        f"{distribution.name} {distribution.version}"
        for distribution in importlib.metadata.distributions()
        if distribution.name.lower().startswith(("jax", "libtpu", "nvidia"))
    )
    settings = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith(("JAX_", "XLA_", "LIBTPU_", "TPU_")) and not name.endswith(("_DIR", "_PATH"))
    )
    # What `jax.jit` was told for the compiler is in no public place.
    lowering: Any = lowered._lowering
    options = lowering._compiler_options_kvs
    facts = repr((target, compilers, settings, sorted(options), lowered.as_text()))
    return hashlib.sha256(facts.encode()).hexdigest()
