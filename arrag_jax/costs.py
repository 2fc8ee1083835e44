"""Counts what a compiled program does: arithmetic, memory traffic and traffic between chips.

``cost_analysis`` of XLA counts the body of a loop once. This module reads the text of the compiled program, counts each
loop as often as it runs, and leaves out what stays in a chip's fast memory (VMEM, the memory space S(1) of a layout).
"""

import json
import math
import re
from collections import Counter
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s4": 0.5}
_BYTES |= {"u4": 0.5, "s64": 8, "u64": 8, "f64": 8, "c64": 8} | dict.fromkeys(("f8e4m3fn", "f8e5m2"), 1)
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*)")
_NAME = re.compile(r"%([\w.-]+)")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"}
_FREE |= {"copy-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "async-update", "async-done"}
_FREE |= {"opt-barrier", "replica-id", "add-dependency", "slice-done", "dynamic-slice-done", "custom-call-done"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SLICES = {"dynamic-slice", "slice", "gather"}


class Costs(NamedTuple):
    """What one chip does in one run of a program.

    Attributes:
      flops: floating-point operations of matrix products and convolutions.
      bytes: bytes that are read from and written to the chip's main memory.
      link_bytes: bytes that the chip sends to other chips.
      collectives: number of collective operations, by name.
    """

    flops: float = 0.0
    bytes: float = 0.0
    link_bytes: float = 0.0
    collectives: tuple[tuple[str, int], ...] = ()

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """Returns the sum, with the other costs ``times`` as often."""
        counted = Counter(dict(self.collectives))
        for name, count in other.collectives:
            counted[name] += count * times
        return Costs(
            self.flops + times * other.flops,
            self.bytes + times * other.bytes,
            self.link_bytes + times * other.link_bytes,
            tuple(sorted(counted.items())),
        )


class _Op(NamedTuple):
    name: str
    shape: str
    kind: str
    operands: list[str]
    rest: str  # attributes
    root: bool


def costs_of(text: str) -> Costs:
    """Returns the costs of a compiled program, given its text (``compiled.as_text()``)."""
    return _Reader(text).total()


class _Reader:
    """The computations of a program by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Op]] = {}
        self.entry = ""
        self._known: dict[str, Costs] = {}
        current: dict[str, _Op] = {}
        for line in text.splitlines():
            if line.endswith("{") and ") -> " in line and not line.startswith(" "):
                name = next(iter(_NAME.findall(line)))
                current = self.computations[name] = {}
                if line.startswith("ENTRY"):
                    self.entry = name
            elif found := _LINE.match(line):
                op = _parsed(found[1], found[2], line.lstrip().startswith("ROOT"))
                current[op.name] = op

    def total(self) -> Costs:
        return self._of(self.entry)

    def _of(self, name: str) -> Costs:
        if name not in self._known:
            total = Costs()
            for op in self.computations.get(name, {}).values():
                total = total.plus(self.of_op(op, self.computations[name]))
            self._known[name] = total
        return self._known[name]

    def of_op(self, op: _Op, beside: dict[str, _Op]) -> Costs:
        """Returns the costs of one operation of a computation."""
        kind = op.kind
        if kind in _FREE:
            return Costs()
        if kind == "while":
            once = self._of(_named(op, "body")).plus(self._of(_named(op, "condition")))
            return Costs().plus(once, self._trips(op))
        if kind in ("call", "async-start"):
            return self._of(_named(op, "to_apply") or _named(op, "calls"))
        if kind == "conditional":  # the branches differ; the dearest is counted
            branches = _NAME.findall(_found(r"branch_computations=\{([^}]*)\}", op.rest))
            return max(map(self._of, branches), key=lambda costs: costs.bytes)
        operands = [beside[name].shape for name in op.operands if name in beside]
        base = kind.removesuffix("-start")
        if base in _COLLECTIVES:
            moved = _size(op.shape) if base != "reduce-scatter" else sum(map(_size, operands), 0.0)
            if kind.endswith("-start"):
                moved = max((_size(part) for part in _parts(op.shape)), default=0.0)
            group = _group(op.rest)
            sent = moved * (2 if base == "all-reduce" else 1) * (group - 1) / max(group, 1)
            return Costs(0.0, 2 * moved, moved if base == "collective-permute" else sent, ((base, 1),))
        if base == "copy" and kind != base:  # a copy between the memories: only one side is main memory
            return Costs(bytes=_size(_parts(op.shape)[1]) if _parts(op.shape) else 0.0)
        if kind == "custom-call":
            return self._kernel(op, operands)
        if kind == "fusion":
            return self._fused(op, beside)
        flops = _flops(op, beside)
        if base in ("dynamic-slice", "slice") and kind != base:  # its shape is (operands, result, …)
            (taken,) = _parts(op.shape)[len(op.operands) : len(op.operands) + 1] or [""]
            return Costs(bytes=_size(taken) + _held(taken))
        if kind in _SLICES:
            return Costs(flops, 2 * _held(op.shape))
        if kind in ("dynamic-update-slice", "scatter"):
            return Costs(flops, 2 * _held(operands[-1 if kind == "scatter" else 1]))
        return Costs(flops, _held(op.shape) + sum(map(_held, operands), 0.0))

    def _kernel(self, op: _Op, operands: list[str]) -> Costs:
        """Returns the costs of a hand-written kernel: its own estimate, or else all that it is given and returns."""
        given = re.search(r'"cost_estimate":(\{[^}]*\})', op.rest)
        estimate = json.loads(given[1]) if given else {}
        moved = _held(op.shape) + sum(map(_held, operands), 0.0)
        return Costs(float(estimate.get("flops", 0)), float(estimate.get("bytes_accessed", moved)))

    def _fused(self, op: _Op, beside: dict[str, _Op]) -> Costs:
        """Returns the costs of a fusion: its products, and the parts of operands and outputs that it touches."""
        inner = self.computations[_named(op, "calls")]
        flops = sum((self._inner_flops(other, inner) for other in inner.values()), 0.0)
        parameters = {_index(other): other for other in inner.values() if other.kind == "parameter"}
        moved = 0.0
        for i, name in enumerate(op.operands):
            if name not in beside or i not in parameters:
                continue
            moved += min(_held(beside[name].shape), self._read(parameters[i].name, inner))
        root = next(other for other in inner.values() if other.root)
        for part in [inner[name] for name in root.operands] if root.kind == "tuple" else [root]:
            written = part.kind == "dynamic-update-slice"
            shape = inner[part.operands[1]].shape if written and part.operands[1] in inner else part.shape
            moved += _held(shape) if len(_parts(op.shape)) else min(_held(shape), _held(op.shape))
        return Costs(flops, moved)

    def _inner_flops(self, op: _Op, beside: dict[str, _Op]) -> float:
        if op.kind == "fusion":
            inner = self.computations[_named(op, "calls")]
            return sum((self._inner_flops(other, inner) for other in inner.values()), 0.0)
        return _flops(op, beside)

    def _read(self, name: str, inner: dict[str, _Op]) -> float:
        """Returns how many bytes of a parameter a fusion reads: all of it, unless it only takes slices."""
        users = [op for op in inner.values() if name in op.operands]
        total = 0.0
        for op in users:
            if op.kind in _SLICES and op.operands[0] == name:
                total += _size(op.shape)
            elif op.kind == "dynamic-update-slice" and op.operands[0] == name:
                continue  # written in place
            elif op.kind == "bitcast":
                total += self._read(op.name, inner)
            elif op.kind == "fusion":
                nested = self.computations[_named(op, "calls")]
                own = {_index(other): other for other in nested.values() if other.kind == "parameter"}
                total += self._read(own[op.operands.index(name)].name, nested)
            else:
                return math.inf
        return total

    def _trips(self, op: _Op) -> int:
        """Returns how often a loop runs; 1 if the compiler does not know."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest)
        if known:
            return int(known[1])
        numbers = [other for other in self.computations[_named(op, "condition")].values() if other.kind == "constant"]
        limits = [int(found[1]) for other in numbers if (found := re.match(r"(\d+)\)", other.rest))]
        return max(limits, default=1)


def _parsed(name: str, text: str, root: bool) -> _Op:
    """Returns an operation from ``shape kind(operands), attributes``."""
    end = _closing(text, 1) + 1 if text.startswith("(") else text.index(" ")
    shape, (kind, _, rest) = text[:end], text[end:].strip().partition("(")
    close = _closing(rest, 0)
    attributes = rest if kind in ("constant", "parameter") else rest[close:]
    return _Op(name, shape, kind, _NAME.findall(rest[:close]), attributes, root)


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one before ``start``."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _index(op: _Op) -> int:
    return int(_found(r"^(\d+)", op.rest))


def _named(op: _Op, attribute: str) -> str:
    return _found(rf"\b{attribute}=%([\w.-]+)", op.rest)


def _found(pattern: str, text: str) -> str:
    """Returns the pattern's group in a text; "" if it does not occur."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _parts(shape: str) -> list[str]:
    """Returns the arrays of a tuple; [] for an array."""
    return [found[0] for found in _ARRAY.finditer(shape)] if shape.startswith("(") else []


def _size(shape: str) -> float:
    """Returns the bytes of an array or of all arrays of a tuple."""
    return sum((_array_size(found) for found in _ARRAY.finditer(shape)), 0.0)


def _held(shape: str) -> float:
    """Returns the bytes that lie in main memory."""
    held = (found for found in _ARRAY.finditer(shape) if "S(1)" not in (found[3] or ""))
    return sum(map(_array_size, held), 0.0)


def _array_size(found: re.Match) -> float:
    return float(_BYTES.get(found[1], 0) * math.prod(int(n) for n in found[2].split(",") if n))


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _flops(op: _Op, beside: dict[str, _Op]) -> float:
    """Returns the operations of a matrix product or convolution, two per multiply-add; 0 for anything else."""
    if op.kind == "dot":
        left = _dims(beside[op.operands[0]].shape)
        contracted = _found(r"lhs_contracting_dims=\{([0-9,]*)\}", op.rest)
        return 2.0 * math.prod(_dims(op.shape)) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    if op.kind == "convolution":
        kernel = _dims(beside[op.operands[1]].shape)
        outputs = kernel[_found(r"dim_labels=\w+_(\w+)->", op.rest).index("o")]
        return 2.0 * math.prod(_dims(op.shape)) * math.prod(kernel) / max(outputs, 1)
    return 0.0


def _group(rest: str) -> int:
    """Returns the number of chips of a collective's group; the compiler writes groups in one of three forms."""
    named = re.search(r"replica_groups=mesh\[([^]]*)\] \{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        return math.prod(int(size or sizes[axis]) for axis, size in re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2]))
    listed = _found(r"replica_groups=\{\{([0-9,]*)\}", rest)
    return len(listed.split(",")) if listed else int(_found(r"replica_groups=\[\d+,(\d+)\]", rest) or 2)
