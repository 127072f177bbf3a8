"""Bytes that a compiled program moves between a device and its memory, read from its HLO text.

Every operation reads its operands and writes its result once, however often it uses them; what is fused stays inside.
Of an array that an operation only takes slices from, the slices count; of one that it updates in place, the update.
A transfer in two halves counts where it starts. What lies in a memory on the chip is free.
"""

from collections import Counter
from functools import partial
from typing import NamedTuple

from s1jax.planning.hlo import BESIDE, COLLECTIVES, Computation, Instruction, Program, Shape

_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier", "iota"}
_FREE |= {
    "while",
    "conditional",
    "call",
    "call-start",
    "call-update",
    "call-done",
    "partition-id",
    "replica-id",
    "add-dependency",
    "async-update",
    "async-done",
    "fusion-done",
}
"""Operations that move nothing, or whose inside is counted in its own place."""
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that write into their first operand in place, and which operand is what they write."""
_PASSING_ON = ("bitcast", "reshape", "convert", "copy", "transpose")
"""Operations that a fusion may have between a parameter and the slice that it takes of it."""
_WHOLE = {
    "abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "complex", "concatenate", "convert",
    "convolution", "copy", "cosine", "divide", "dot", "erf", "exponential", "exponential-minus-one", "floor",
    "imag", "is-finite", "log", "log-plus-one", "logistic", "map", "maximum", "minimum", "multiply", "negate",
    "not", "or", "pad", "popcnt", "power", "real", "reduce", "reduce-precision", "reduce-window", "remainder",
    "reshape", "reverse", "rng-bit-generator", "round-nearest-afz", "round-nearest-even", "rsqrt", "select",
    "select-and-scatter", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sort",
    "sqrt", "stochastic-convert", "subtract", "tan", "tanh", "topk", "transpose", "xor", "cholesky",
    "triangular-solve", "fft", "bitcast-convert"
}  # fmt: skip
"""Operations that read all of their operands and write all of their result."""
_PIECE_STARTS = {"slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}
_STARTS = {"copy-start"} | _PIECE_STARTS | {f"{kind}-start" for kind in COLLECTIVES}
_FREE_CALLS = {"ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked", "AllocateBuffer"}
_FREE_CALLS |= {
    "PrepareAsyncCallStart",
    "PrepareAsyncCallDone",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
}
"""Targets of custom calls that move nothing: notes to the compiler, and pieces that already lie side by side."""
_KERNEL_CALLS = ("tpu_custom_call", "cudnn", "cublas", "triton", "TopK", "cub$")
"""Parts of the targets of custom calls that read their operands and write their results."""


class Traffic(NamedTuple):
    """Bytes read and written by one run of a program."""

    num_bytes: float
    unknown: dict[str, int]
    """Operations that the counter does not know, which are not among the bytes, and how often each runs."""


def memory_traffic(program: Program) -> Traffic:
    """Of one run of the program; a loop without a known trip count is counted once."""
    unknown = Counter[str]()
    for instruction, times in program.operations():
        if not _known(instruction):
            unknown[program.target(instruction) or instruction.opcode] += int(times)
    num_bytes = program.sum(lambda instruction, computation: operation_traffic(program, instruction, computation))
    return Traffic(num_bytes, dict(unknown))


class HostTraffic(NamedTuple):
    """Bytes that one run of a program moves between a device and its host's memory."""

    written: float
    """To the host."""
    read: float


def host_traffic(program: Program) -> HostTraffic:
    """Of one run of the program."""

    def moved(instruction: Instruction, computation: Computation, to_host: bool) -> float:
        if instruction.opcode == "fusion" or instruction.opcode in BESIDE:
            inner = program.called_by(instruction) or {}
            return sum((moved(inside, inner, to_host) for inside in inner.values()), 0.0)
        transfer = _transfer(instruction, computation)
        if transfer is None:
            return 0.0
        source, target, piece = transfer
        return float(piece.num_bytes) if source.on_host != to_host == target.on_host else 0.0

    return HostTraffic(program.sum(partial(moved, to_host=True)), program.sum(partial(moved, to_host=False)))


def _transfer(instruction: Instruction, computation: Computation) -> tuple[Shape, Shape, Shape] | None:
    """Of an operation that moves an array or a piece of one: where it was, where it is then, what moves."""
    opcode, shapes = instruction.opcode, instruction.shapes
    operands = [computation[name].shapes[0] for name in instruction.operands if name in computation]
    if opcode in (*_SLICES, "copy") and operands:
        return operands[0], shapes[0], shapes[0]
    if opcode in _UPDATES and len(operands) > _UPDATES[opcode]:
        return operands[_UPDATES[opcode]], shapes[0], operands[_UPDATES[opcode]]
    if opcode == "copy-start":
        return shapes[1], shapes[0], shapes[0]
    if opcode in _PIECE_STARTS:
        # The whole array comes first, then what is taken of it or put there, before or after the indices.
        piece = next(shape for shape in shapes[1:] if shape.dimensions)
        return (piece, shapes[0], piece) if "update" in opcode else (shapes[0], piece, piece)
    return None


def launches(program: Program) -> int:
    """Operations that one run of the program starts one after the other; copies and collectives beside them aside."""
    aside = {*_FREE, *_STARTS, *COLLECTIVES}
    return sum(
        int(times)
        for instruction, times in program.operations()
        if instruction.opcode not in aside
        and not instruction.opcode.endswith("-done")
        and program.target(instruction) not in _FREE_CALLS
    )


def _known(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    if opcode == "custom-call":
        target = Program.target(instruction) or ""
        return target in _FREE_CALLS or any(part in target for part in _KERNEL_CALLS)
    is_done = opcode.endswith("-done") and opcode.removesuffix("done") + "start" in _STARTS
    others = {"fusion", "broadcast", *BESIDE, *_SLICES, *_UPDATES, *COLLECTIVES}
    return is_done or opcode in _FREE | _WHOLE | _STARTS | others


def operation_traffic(program: Program, instruction: Instruction, computation: Computation) -> float:
    """Bytes of one run of an operation, or of one that it starts; 0 where it runs others on their own account."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or not _known(instruction):
        return 0.0
    if opcode == "custom-call" and Program.target(instruction) in _FREE_CALLS:
        return 0.0
    if opcode in _STARTS:
        return _start_traffic(instruction, computation)
    if opcode in _SLICES:
        return float(min(instruction.num_bytes, _operand_bytes(instruction, computation, 0)) + instruction.memory_bytes)
    if opcode in _UPDATES:
        sides = 2.0 if instruction.memory_bytes else 1.0
        return sides * _operand_bytes(instruction, computation, _UPDATES[opcode])
    if opcode == "broadcast":
        return float(instruction.memory_bytes)
    if opcode == "fusion":
        return _fusion_traffic(program, instruction, computation)
    if opcode in BESIDE:
        inner = program.called_by(instruction) or {}
        return sum(operation_traffic(program, inside, inner) for inside in inner.values())
    return float(_all_operands(instruction, computation) + instruction.memory_bytes)


def _start_traffic(instruction: Instruction, computation: Computation) -> float:
    """Of a transfer's first half, whose result is a tuple of its operands, its results and flags, in some order."""
    if transfer := _transfer(instruction, computation):
        *both, piece = transfer
        return float(sum(0 if side.space else piece.num_bytes for side in both))
    if instruction.opcode == "all-reduce-start":
        return float(_all_operands(instruction, computation) + instruction.memory_bytes)
    # The others' results hold the operands too, which are read once.
    return float(instruction.memory_bytes)


def _operand_bytes(instruction: Instruction, computation: Computation, index: int) -> int:
    operand = computation.get(instruction.operands[index])
    return operand.memory_bytes if operand else 0


def _all_operands(instruction: Instruction, computation: Computation) -> int:
    return sum(_operand_bytes(instruction, computation, i) for i in range(len(instruction.operands)))


def _fusion_traffic(program: Program, instruction: Instruction, computation: Computation) -> float:
    inner = program.called_by(instruction)
    if inner is None:
        return float(instruction.memory_bytes)
    users: dict[str, list[Instruction]] = {}
    for inside in inner.values():
        for operand in inside.operands:
            users.setdefault(operand, []).append(inside)
    reads = 0.0
    for inside in inner.values():
        if inside.opcode == "parameter":
            reads += _read_of(inside, inside.memory_bytes, users, inner)
    return reads + _written(instruction, inner)


def _read_of(source: Instruction, whole: int, users: dict[str, list[Instruction]], inner: Computation) -> float:
    """Bytes that a fusion reads of a parameter: all of it, unless every use is a slice or an update in place."""
    total = 0.0
    for user in users.get(source.name, []):
        if user.opcode in _SLICES and user.operands[0] == source.name:
            total += user.num_bytes
        elif user.opcode in _UPDATES and user.operands[0] == source.name:
            continue
        elif user.opcode in _PASSING_ON and user.name in users:
            total += _read_of(user, whole, users, inner)
        else:
            return float(whole)
    return min(total, float(whole))


def _written(instruction: Instruction, inner: Computation) -> float:
    """Bytes that a fusion writes: its results, or only the update of those updated in place."""
    roots = [inside for inside in inner.values() if inside.is_root]
    if roots and roots[0].opcode == "tuple":
        roots = [inner[name] for name in roots[0].operands if name in inner]
    return float(sum(_updated_bytes(root, inner) for root in roots) if roots else instruction.memory_bytes)


def _updated_bytes(root: Instruction, inner: Computation) -> int:
    while root.opcode in _PASSING_ON and root.operands and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.opcode in _UPDATES and root.memory_bytes:
        return _operand_bytes(root, inner, _UPDATES[root.opcode])
    return root.memory_bytes
