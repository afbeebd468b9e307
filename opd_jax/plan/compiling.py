"""What a compiled program takes on each chip, or by how much it does not fit, from the compiler."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax

from opd_jax.plan.collectives import Collectives, count_collectives
from opd_jax.plan.programs import Parts, Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_MESSAGES = (
    re.compile(rf"Exceeded hbm capacity by {_SIZE}"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE}i?B? of {_SIZE}i?B? hbm"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One program of the table; bytes are those of one chip. ``temp``, ``outputs``: None where it did not compile."""

    name: str
    parts: Parts  # what is there by name: arguments, residents, temp, fresh outputs
    arguments: int | None
    temp: int | None
    outputs: int | None
    aliased: int | None
    resident: int
    total: int  # at least that much where it did not compile
    over: int  # bytes beyond what a chip has; 0: it fits
    seconds: float  # of compilation
    cpu_seconds: float  # of the same, all threads: what it takes on an idle machine, at most
    needed: bool
    collectives: Collectives | None = None  # by kind

    @property
    def fits(self) -> bool:
        return self.over == 0

    @property
    def largest(self) -> tuple[str, float]:
        """What takes the most, and its share."""
        name = max(self.parts, key=lambda k: self.parts[k])
        return name, self.parts[name] / max(sum(self.parts.values()), 1)


def compile_line(program: Program, usable: int) -> Line:
    """Compiles it. One that does not fit the chip is an answer, not an error."""
    start, cpu = time.perf_counter(), time.process_time()
    resident = sum(program.resident.values())
    parts = program.arguments | program.resident
    collectives = None
    try:
        compiled = program.lower().compile()
        memory: Any = compiled.memory_analysis()
        collectives = count_collectives(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as e:
        wanted = wanted_bytes(str(e), usable)
        if wanted is None:
            raise
        temp = max(wanted - sum(program.arguments.values()), 0)
        total, sizes = wanted + resident, (None,) * 4
        parts |= {"temp": temp}
    else:
        sizes = (
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.output_size_in_bytes,
            memory.alias_size_in_bytes,
        )
        arguments, temp, outputs, aliased = sizes
        fresh = max(outputs - aliased, 0)
        total = arguments + temp + fresh + resident
        other = max(arguments - sum(program.arguments.values()), 0)
        parts |= {"temp": temp, "outputs": fresh, "other arguments": other}
    return Line(
        program.name, parts, *sizes, resident=resident, total=total, over=max(total - usable, 0),
        seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, needed=program.needed,
        collectives=collectives,
    )  # fmt: skip


def wanted_bytes(message: str, usable: int) -> int | None:
    """Bytes that a program needs by the compiler's out-of-memory message; None: the message is about something else."""
    if "RESOURCE_EXHAUSTED" not in message or "vmem" in message.lower():
        return None
    for i, pattern in enumerate(_MESSAGES):
        found = pattern.search(message)
        if found:
            first = int(float(found[1]) * _UNITS[found[2]])
            return usable + first if i == 0 else first
    return None
