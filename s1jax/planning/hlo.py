"""What a compiled program does, read from its HLO text: arithmetic, collectives, kernels and array shapes.

XLA's own cost analysis counts the body of a loop once; here every count is times the loops' known trip counts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

_BYTES: dict[str, float] = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5}
BESIDE = ("async-start", "fusion-start")
"""What starts other operations beside those after it; `called_by` says which."""
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.$-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=\{?%?([\w.$-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)


class Shape(NamedTuple):
    """An array's element type and dimensions."""

    dtype: str
    dimensions: tuple[int, ...]
    space: int = 0
    """The memory that it is in, as XLA numbers them: 0 the device's main memory, 5 the host's, others on the chip."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array; 0 for a token or an unknown type."""
        return int(_BYTES.get(self.dtype, 0) * math.prod(self.dimensions))

    @property
    def on_host(self) -> bool:
        """Whether it is in the host's memory."""
        return self.space == 5


class Collective(NamedTuple):
    """All runs of the collectives of one kind among the same devices."""

    kind: str
    group: tuple[int, ...]
    """Of the groups of devices, the first; the others are laid out alike."""
    runs: int
    num_bytes: int
    """On one device, the larger of what goes in and what comes out, summed over the runs."""


@dataclass(frozen=True)
class Instruction:
    """One operation."""

    name: str
    shapes: tuple[Shape, ...]
    """Of the result; several for a tuple."""
    opcode: str
    operands: tuple[str, ...]
    text: str
    """From the opcode on."""
    is_root: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.num_bytes for shape in self.shapes)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the result that lie in the device's main memory."""
        return sum(shape.num_bytes for shape in self.shapes if not shape.space)


Computation = dict[str, Instruction]
"""The operations of a function, loop body or fusion, by name."""


class Program:
    """A compiled program's HLO: `Program(compiled.as_text())`. All counts are those of one device."""

    def __init__(self, text: str):
        """Parse the text. Raises ValueError if it has no entry computation."""
        self._computations: dict[str, Computation] = {}
        self._entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self._computations.setdefault(opened[1], {})
                if line.startswith("ENTRY"):
                    self._entry = opened[1]
            elif found := _INSTRUCTION.match(line):
                current[found[2]] = _parse(found[2], found[3], is_root=bool(found[1]))
        if not self._entry:
            raise ValueError("not the HLO text of a compiled program: it has no entry computation")

    @cached_property
    def _runs(self) -> dict[str, float]:
        """How often each computation runs on its own account: the entry once, a loop's body as often as it turns."""
        runs: dict[str, float] = defaultdict(float)

        def run(name: str, times: float) -> None:
            runs[name] += times
            for instruction in self._computations[name].values():
                for called, times_inside in self._run_by(instruction):
                    run(called, times * times_inside)

        run(self._entry, 1.0)
        return runs

    def _run_by(self, instruction: Instruction) -> list[tuple[str, int]]:
        """The computations that an operation runs on their own account, and how often each."""
        if instruction.opcode == "while":
            times = self._trips(instruction)
        elif instruction.opcode in ("call", "call-start", "conditional"):
            times = 1
        else:
            return []
        return [(called, times) for called in self._names_called(instruction)]

    @cached_property
    def open_ends(self) -> int:
        """How often a loop or branch runs whose course only the device knows: a GPU's host waits to be told."""
        return sum(
            int(times)
            for instruction, times in self.operations()
            if instruction.opcode == "conditional"
            or (instruction.opcode == "while" and not _TRIPS.search(instruction.text))
        )

    def _trips(self, loop: Instruction) -> int:
        """How often a loop turns: as the compiler notes it, else from the bound and the step of its counter, else 1."""
        if noted := _TRIPS.search(loop.text):
            return int(noted[1])
        condition, body = (
            self._computations[re.search(rf"{role}=%?([\w.$-]+)", loop.text)[1]]  # type: ignore[index]
            for role in ("condition", "body")
        )
        compared = _root(condition)
        if compared.opcode != "compare" or "direction=LT" not in compared.text:
            return 1
        counter, bound = (condition.get(name) for name in compared.operands)
        limit = _constant(bound)
        index = re.search(r"index=(\d+)", counter.text) if counter else None
        if limit is None or index is None:
            return 1
        next_count = body[_root(body).operands[int(index[1])]]
        steps = [_constant(body.get(name)) for name in next_count.operands if next_count.opcode == "add"]
        step = next((step for step in steps if step), 1)
        return -(-limit // step)

    def _names_called(self, instruction: Instruction) -> list[str]:
        found = [match.lstrip("%") for match in _CALLED.findall(instruction.text)]
        for listed in _BRANCHES.findall(instruction.text):
            found += [name.strip().lstrip("%") for name in listed.split(",")]
        return [name for name in found if name in self._computations]

    def called_by(self, instruction: Instruction) -> Computation | None:
        """What a fusion holds."""
        names = self._names_called(instruction)
        return self._computations[names[0]] if names else None

    def sum(self, value: Callable[[Instruction, Computation], float]) -> float:
        """A value of every operation with its computation, added up over all runs; fusions are not looked into."""
        return sum(
            times * sum(value(instruction, computation) for instruction in computation.values())
            for name, times in self._runs.items()
            for computation in [self._computations[name]]
        )

    def operations(self) -> Iterator[tuple[Instruction, float]]:
        """Every operation with how often it runs; fusions are not looked into."""
        for name, times in self._runs.items():
            for instruction in self._computations[name].values():
                yield instruction, times

    @staticmethod
    def target(instruction: Instruction) -> str | None:
        """What a custom call calls; None of another operation."""
        found = _TARGET.search(instruction.text) if instruction.opcode == "custom-call" else None
        return found[1] if found else None

    def waited(
        self, cost: Callable[[Instruction, Computation], float], exchange: Callable[[Collective], float]
    ) -> float:
        """Seconds of one run in which nothing is computed, because what comes next waits for a collective.

        Operations take place one after the other, as scheduled, each for the seconds that `cost` says; collectives,
        which take those of `exchange`, beside them and one at a time, from where they start to where they are needed.
        """

        @cache
        def run(name: str) -> tuple[float, float]:
            """The seconds of a computation, and how many of them are waited."""
            computation = self._computations[name]
            now = waited = link_free = 0.0
            ends: dict[str, float] = {}
            for instruction in computation.values():
                needed = 0.0
                if collective := self._collective(instruction, computation):
                    link_free = max(now, link_free) + exchange(collective)
                    ends[instruction.name] = link_free
                    needed = 0.0 if instruction.opcode.endswith("-start") else link_free
                elif instruction.opcode.endswith("-done"):
                    needed = ends.get(instruction.operands[0], 0.0)
                elif called := self._run_by(instruction):
                    for inner, times in called:
                        seconds, inside = run(inner)
                        now += times * seconds
                        waited += times * inside
                else:
                    now += cost(instruction, computation)
                waited += max(0.0, needed - now)
                now = max(now, needed)
            return now, waited

        return run(self._entry)[1]

    @cached_property
    def dot_flops(self) -> float:
        """Floating-point operations of all matrix products, two for each multiply-add; kernels are not seen into."""
        return self.sum(self.flops)

    def flops(self, instruction: Instruction, computation: Computation) -> float:
        """Of an operation's matrix products."""
        if instruction.opcode in ("dot", "convolution"):
            return _dot_flops(instruction, computation)
        if instruction.opcode == "fusion" or instruction.opcode in BESIDE:
            inner = self.called_by(instruction) or {}
            return sum(self.flops(inside, inner) for inside in inner.values())
        return 0.0

    @cached_property
    def collectives(self) -> list[Collective]:
        """What is exchanged between devices, by kind and group, the most bytes first."""
        found: dict[tuple[str, tuple[int, ...]], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, times in self._runs.items():
            computation = self._computations[name]
            for instruction in computation.values():
                if collective := self._collective(instruction, computation):
                    total = found[collective.kind, collective.group]
                    total[0] += times
                    total[1] += times * collective.num_bytes
        collectives = [Collective(*key, int(count), int(num_bytes)) for key, (count, num_bytes) in found.items()]
        return sorted(collectives, key=lambda c: -c.num_bytes)

    def _collective(self, instruction: Instruction, computation: Computation) -> Collective | None:
        """One run of the collective that an operation is; None if it is none."""
        kind, exchange = self._exchange(instruction)
        if exchange is None:
            return None
        into = sum(s.num_bytes for operand in instruction.operands for s in _shapes_of(computation, operand))
        # The result of an asynchronous start holds its operands too.
        out = instruction.num_bytes - (into if instruction.opcode.endswith("-start") else 0)
        return Collective(kind, _first_group(exchange.text), 1, max(into, out))

    def _exchange(self, instruction: Instruction) -> tuple[str, Instruction | None]:
        """The kind of collective that an operation is, and what names its groups; None if it is none."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return kind, instruction
        if kind == "fusion":
            # TPU writes a reduce-scatter as an all-reduce fused with the slice that is kept of it.
            inner = (self.called_by(instruction) or {}).values()
            return "reduce-scatter", next((inside for inside in inner if inside.opcode == "all-reduce"), None)
        return kind, None

    @cached_property
    def kernels(self) -> dict[str, int]:
        """How often each kind of custom call runs, by its target."""
        found: dict[str, float] = defaultdict(float)
        for instruction, times in self.operations():
            if instruction.opcode == "custom-call":
                found[self.target(instruction) or "unknown"] += times
        return {target: int(count) for target, count in sorted(found.items())}

    def shapes(self) -> Iterator[Shape]:
        """The shape of every array that the program makes, those inside fusions too."""
        for computation in self._computations.values():
            for instruction in computation.values():
                yield from instruction.shapes


def _parse(name: str, definition: str, *, is_root: bool) -> Instruction:
    """Take `f32[2,3]{1,0} dot(%a, %b), ...` apart."""
    start = _end_of_type(definition)
    result, rest = definition[:start], definition[start:].lstrip()
    opcode, _, arguments = rest.partition("(")
    operands = re.findall(r"%([\w.$-]+)", _balanced(arguments))
    shapes = tuple(Shape(dtype, _dimensions(text), int(space or 0)) for dtype, text, space in _SHAPE.findall(result))
    return Instruction(name, shapes, opcode.strip(), tuple(operands), rest, is_root)


def _end_of_type(definition: str) -> int:
    """Where the result type ends: at the first space outside of parentheses and braces."""
    depth = 0
    for i, character in enumerate(definition):
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == " " and depth == 0:
            return i
    return len(definition)


def _balanced(arguments: str) -> str:
    """The text up to the parenthesis that closes the arguments."""
    depth = 1
    for i, character in enumerate(arguments):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return arguments[:i]
    return arguments


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _constant(instruction: Instruction | None) -> int | None:
    """The value of an integer constant."""
    found = re.match(r"constant\((\d+)\)", instruction.text) if instruction else None
    return int(found[1]) if found else None


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _shapes_of(computation: Computation, name: str) -> tuple[Shape, ...]:
    return computation[name].shapes if name in computation else ()


def _first_group(text: str) -> tuple[int, ...]:
    """The devices of a collective's first group, in whichever of three notations its groups are written."""
    if listed := _LISTED_GROUPS.search(text):
        return _dimensions(listed[1])
    if iota := _IOTA_GROUPS.search(text):
        ids = _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
        return tuple(ids[0].tolist())
    if mesh := _MESH_GROUPS.search(text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        shape = [int(size) for size in sizes.values()]
        ids = (_iota(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(shape))).reshape(shape)
        among = set(re.findall(r"'(\w+)'", mesh[4]))
        return tuple(ids[tuple(slice(None) if name in among else 0 for name in sizes)].ravel().tolist())
    return ()


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of this shape, transposed."""
    ids = np.arange(math.prod(_dimensions(shape))).reshape(_dimensions(shape))
    return (ids.transpose(_dimensions(permutation)) if permutation else ids).ravel()


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    """Two operations for each element of the result and of the summed dimensions."""
    left, right = (_shapes_of(computation, name)[0].dimensions for name in instruction.operands[:2])
    result = math.prod(instruction.shapes[0].dimensions)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        return 2.0 * result * math.prod(left[i] for i in _dimensions(contracted[1] if contracted else ""))
    return _convolution_flops(instruction, left, right)


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """TPU writes matrix products as convolutions, batch dimensions as spatial ones whose padding is not computed."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    assert labels is not None, instruction.text
    inputs, kernel, outputs = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(
        labels.groups(), (left, right, instruction.shapes[0].dimensions), strict=True
    ))  # fmt: skip
    window = re.search(r"window=\{([^}]*)\}", instruction.text)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
    products = float(outputs["b"] * outputs["f"] * kernel["i"])
    for dimension in range(len(left) - 2):

        def setting(name: str, default: str, dimension: int = dimension) -> str:
            return settings[name].split("x")[dimension] if name in settings else default

        label = str(dimension)
        place = int(setting("stride", "1")) * np.arange(outputs[label])[:, None]
        place = place + int(setting("rhs_dilate", "1")) * np.arange(kernel[label])
        place = place - int(setting("pad", "0_0").split("_")[0])
        spread = int(setting("lhs_dilate", "1"))
        inside = (place >= 0) & (place <= (inputs[label] - 1) * spread) & (place % spread == 0)
        products *= np.count_nonzero(inside)
    return 2.0 * products
