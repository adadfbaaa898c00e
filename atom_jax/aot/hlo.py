"""What a compiled program sends between devices, read from its text (XLA's HLO)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "token": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_OPCODE = re.compile(r"([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=\d+")
_OPERAND = re.compile(r"%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """bytes: kind of collective -> bytes that one device sends in one run of the program, with ring algorithms.
    counts: kind -> how many times it is run. open_loops: loops with collectives inside whose number of rounds the
    program does not state; their rounds are counted once."""

    bytes: dict[str, float]
    counts: dict[str, int]
    open_loops: int = 0

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.bytes.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {n / 2**30:.3f}" for kind, n in sorted(self.bytes.items()))
        loops = f" (counting one round of {self.open_loops} loops of unknown length)" if self.open_loops else ""
        return f"{self.total / 2**30:9.3f} GiB per chip and step: {parts or 'nothing'}{loops}"


@dataclasses.dataclass(frozen=True)
class _Line:
    """One instruction: its name, opcode, the text of its type, and everything after its opening parenthesis."""

    name: str
    opcode: str
    type: str
    rest: str


def traffic(text: str) -> Traffic:
    """The collectives of a compiled module (`jax.stages.Compiled.as_text()`); loops count as often as they run.

    Raises ValueError where the text has no entry computation or a type of unknown size."""
    devices = int((re.search(r"num_partitions=(\d+)", text) or [0, "1"])[1])
    computations, entry = _computations(text)

    @functools.cache
    def total(name: str) -> Traffic:
        sum_ = _Sum()
        # TPU: a collective that runs beside products stands in the fusion that starts it, in each that goes on with
        # it, and in the one that ends it.
        started = set()
        for line in computations[name]:
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                sum_.add(_one(kind, line, devices))
            elif line.opcode == "fusion":
                for called in _called(line):
                    for inner in (x for x in computations[called] if x.opcode in KINDS):
                        key = (_CHANNEL.search(inner.rest) or [""])[0], inner.opcode
                        if key not in started:
                            # TPU: every device keeps its part of the sum only.
                            scatters = called.startswith("all-reduce-scatter")
                            sum_.add(_one("reduce-scatter" if scatters else inner.opcode, inner, devices))
                        started.add(key)
            elif line.opcode == "conditional":
                sum_.add(max((total(b) for b in _called(line)), key=lambda t: t.total))
            elif not line.opcode.endswith(("-done", "-update")):
                inside = [total(c) for c in _called(line)]
                rounds = 1 if line.opcode != "while" else _rounds(line, computations[name], computations)
                for one in inside:
                    sum_.add(one, rounds or 1)
                sum_.open_loops += rounds is None and any(one.counts for one in inside)
        return Traffic(dict(sum_.bytes), dict(sum_.counts), sum_.open_loops)

    return total(entry)


class _Sum:
    """Traffic that adds up."""

    def __init__(self):
        self.bytes: collections.Counter = collections.Counter()
        self.counts: collections.Counter = collections.Counter()
        self.open_loops = 0

    def add(self, other: Traffic, times: int = 1) -> None:
        for kind in other.counts:
            self.bytes[kind] += other.bytes[kind] * times
            self.counts[kind] += other.counts[kind] * times
        self.open_loops += other.open_loops


def _one(kind: str, line: _Line, devices: int) -> Traffic:
    return Traffic({kind: _sent(kind, line, devices)}, {kind: 1})


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """The instructions of every computation, and the name of the entry."""
    computations: dict[str, list[_Line]] = {}
    entry, lines = "", []
    for raw in text.splitlines():
        head = _HEAD.match(raw)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif " = " in raw:
            lines.append(_line(*raw.split(" = ", 1)))
    if not entry:
        raise ValueError("the text of the compiled program has no entry computation")
    return computations, entry


def _line(left: str, right: str) -> _Line:
    """An instruction from its name and what follows: a type, which may be a tuple, and an application."""
    name = left.split()[-1].lstrip("%")
    end = _closing(right) if right.startswith("(") else right.index(" ")
    found = _OPCODE.match(right, end + 1)
    return _Line(name, found[1], right[:end], right[found.end() :]) if found else _Line(name, "", "", "")


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the first one."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced type in the text of the compiled program: {text[:80]}")


def _rounds(loop: _Line, around: list[_Line], computations: dict[str, list[_Line]]) -> int | None:
    """How often a loop runs: as XLA noted it, or else from a condition "counter < constant" and the counter's first
    value; None where that is no constant."""
    noted = _TRIPS.search(loop.rest)
    if noted:
        return int(noted[1])
    condition = {line.name: line for line in computations[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]}
    test = next(reversed(condition.values()))
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition[n] for n in _OPERAND.findall(test.rest.split(")")[0]))
    index = re.search(r"index=(\d+)", counter.rest)
    outside = {line.name: line for line in around}
    first = outside.get(_OPERAND.findall(loop.rest)[0])
    if bound.opcode != "constant" or index is None or first is None or first.opcode != "tuple":
        return None
    first = outside.get(_OPERAND.findall(first.rest)[int(index[1])])
    while first is not None and first.opcode in ("copy", "bitcast"):
        first = outside.get(_OPERAND.findall(first.rest)[0])
    if first is None or first.opcode != "constant":
        return None
    return int(bound.rest.split(")")[0]) - int(first.rest.split(")")[0])


def _called(line: _Line) -> list[str]:
    branches = _BRANCHES.search(line.rest)
    listed = [b.strip().lstrip("%") for b in branches[1].split(",")] if branches else []
    return listed + _CALLED.findall(line.rest)


def _sent(kind: str, line: _Line, devices: int) -> float:
    """Bytes that a device sends. Of n that take part in a ring, each sends n - 1 pieces."""
    result = line.type
    if line.opcode in ("all-gather-start", "collective-permute-start"):
        result = _parts(line.type)[1]
    size = sum(_bytes(*array) for array in _ARRAY.findall(result))
    if kind == "collective-permute":
        pairs = re.findall(
            r"\{(\d+),(\d+)\}", line.rest.partition("source_target_pairs=")[2].partition("}}")[0] + "}"
        )
        return size * sum(a != b for a, b in pairs) / devices
    n = _group(line.rest, devices)
    if kind == "reduce-scatter" and line.opcode == "reduce-scatter":
        size *= n
    factor = 2 if kind == "all-reduce" else 1
    return size * factor * (n - 1) / n


def _group(rest: str, devices: int) -> int:
    """Devices that take part together."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        # An axis as a whole, or a part of it, 'axis':(major size)size.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    return len(listed[1].split(",")) if listed else devices


def _parts(type_: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth, start = [], 0, 1
    for i, c in enumerate(type_):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or depth == 0:
            parts.append(type_[start:i])
            start = i + 1
    return parts


def _bytes(dtype: str, shape: str) -> float:
    bits = BITS.get(dtype) or int((re.match(r"[a-z]+(\d+)", dtype) or [0, "-1"])[1])
    if bits < 0:
        raise ValueError(f"type of unknown size in the text of the compiled program: {dtype}")
    count = 1
    for n in filter(None, shape.split(",")):
        count *= int(n)
    return count * bits / 8
