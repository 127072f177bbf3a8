"""Bytes that a compiled program moves between a device and its memory, read from its HLO text.

Every operation reads its operands and writes its result once, however often it uses them; what is fused stays inside.
Of an array that a fusion only takes slices from, the slices count; of one that it updates in place, the update.
What lies in a memory on the chip is free.
"""

from s1jax.planning.hlo import Computation, Instruction, Program

_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier", "iota"}
_FREE |= {"while", "conditional", "call", "partition-id", "replica-id", "add-dependency", "async-update"}
"""Operations that move nothing, or whose inside is counted in its own place."""
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that write into their first operand in place, and which operand is what they write."""
_PASSING_ON = ("bitcast", "reshape", "convert", "copy", "transpose")
"""Operations that a fusion may have between a parameter and the slice that it takes of it."""


def memory_traffic(program: Program) -> float:
    """Bytes read and written by one run of the program; a loop without a known trip count is counted once."""
    return program.sum(lambda instruction, computation: _traffic(program, instruction, computation))


def _traffic(program: Program, instruction: Instruction, computation: Computation) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode == "copy-start":
        # Its result is a tuple of target, source and a flag; copies into VMEM are what a TPU prefetches weights by.
        target = instruction.shapes[0]
        return float(_operand_bytes(instruction, computation, 0) + (0 if target.on_chip else target.num_bytes))
    if opcode in _SLICES:
        return float(min(instruction.num_bytes, _operand_bytes(instruction, computation, 0)) + instruction.memory_bytes)
    if opcode in _UPDATES:
        return 2.0 * _operand_bytes(instruction, computation, _UPDATES[opcode])
    if opcode == "broadcast":
        return float(instruction.memory_bytes)
    if opcode in ("fusion", "async-start"):
        return _fusion_traffic(program, instruction, computation)
    reads = sum(_operand_bytes(instruction, computation, i) for i in range(len(instruction.operands)))
    return float(reads + instruction.memory_bytes)


def _operand_bytes(instruction: Instruction, computation: Computation, index: int) -> int:
    operand = computation.get(instruction.operands[index])
    return operand.memory_bytes if operand else 0


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
    if root.opcode in _UPDATES:
        return _operand_bytes(root, inner, _UPDATES[root.opcode])
    return root.memory_bytes
