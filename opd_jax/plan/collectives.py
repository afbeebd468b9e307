"""Transfers between chips in a compiled program, read from its text."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

Collectives = Mapping[str, Mapping[str, int]]
"""Kind → ``count`` and ``bytes`` (of one chip)."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> [^\n]*)?\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\d+m\d+\w*)?|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_NAME = re.compile(r"%([\w.-]+)")


class _Operation(NamedTuple):
    kind: str
    result: str  # its type
    rest: str  # operands and attributes


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """Transfers of a compiled program by kind: how often, and bytes of a chip.

    Bytes are the larger of what a chip gives and what it gets. What stands in a loop of known length, as over layers,
    counts as often as it runs; in one whose length depends on the data (passes of rows, chunks of tokens), once. Of
    the branches of a condition the one with most bytes counts.
    """
    computations, entry = _computations(text)
    types = {name: o.result for operations in computations.values() for name, o in operations.items()}
    found: dict[str, dict[str, int]] = {}
    for kind, times, size in _transfers(computations, types, entry, 1):
        row = found.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += times
        row["bytes"] += times * size
    return found


def _computations(text: str) -> tuple[dict[str, dict[str, _Operation]], str]:
    found: dict[str, dict[str, _Operation]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif operation := _OPERATION.match(line):
            current[operation[1]] = _Operation(operation[3], operation[2], operation[4])
    return found, entry


def _transfers(
    computations: dict[str, dict[str, _Operation]], types: Mapping[str, str], name: str, times: int
) -> Iterator[tuple[str, int, int]]:
    """Kind of every transfer that runs, how often, and its bytes."""
    for operation in computations.get(name, {}).values():
        if (kind := operation.kind.removesuffix("-start")) in KINDS:
            yield kind, times, _bytes(operation, types)
        if operation.kind.endswith(("-update", "-done")) or operation.kind in ("reduce", "all-reduce", "scatter"):
            continue  # the first two name again what their start runs; the others' computation is of two numbers
        trips = _trips(operation, computations) if operation.kind == "while" else 1
        branches = _BRANCHES.search(operation.rest)
        called = _CALLED.findall(operation.rest) + (_NAME.findall(branches[1]) if branches else [])
        inner = [list(_transfers(computations, types, name, times * trips)) for name in called]
        if operation.kind == "conditional" and inner:
            inner = [max(inner, key=lambda branch: sum(n * size for _, n, size in branch))]
        yield from itertools.chain.from_iterable(inner)


def _trips(loop: _Operation, computations: dict[str, dict[str, _Operation]]) -> int:
    """How often a loop runs: as the compiler says, or by a condition "counter < constant", counting from 0."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = _CONDITION.search(loop.rest)
    inside = computations.get(condition[1], {}) if condition else {}
    for operation in inside.values():
        if operation.kind == "compare" and "direction=LT" in operation.rest:
            names = _NAME.findall(_inside(operation.rest))
            held = [inside[name].rest for name in names if name in inside and inside[name].kind == "constant"]
            return int(_inside(held[0])) if held else 1
    return 1


def _bytes(operation: _Operation, types: Mapping[str, str]) -> int:
    operands = _inside(operation.rest)
    given = _size(operands) or sum(_size(types.get(name, "")) for name in _NAME.findall(operands))
    got = _size(operation.result)
    if operation.kind.endswith("-start") and operation.result.startswith("("):
        got -= given  # operands and results in one tuple
    return max(given, got)


def _inside(text: str) -> str:
    """Up to the bracket that closes."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:i]
    return text


def _size(types: str) -> int:
    return sum(
        _width(kind) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in _SHAPE.findall(types)
    )


def _width(kind: str) -> int:
    """Bytes of an element; those of less than a byte count as one."""
    bits = 8 if kind == "pred" else 16 if kind == "bf16" else int(re.sub(r"^[a-z]+", "", kind).partition("e")[0])
    return max(bits // 8, 1)
