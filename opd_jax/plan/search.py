"""The nearest setting that fits: as few changes as possible, each compiled before it is told.

A cache is spread over all chips already, so what it lacks only fewer slots give; a mesh is changed for weights that do
not fit. Within a mesh: smaller passes, then more recomputation, then fewer slots and smaller evaluation batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from opd_jax.config import Config
from opd_jax.config_files import parse_config
from opd_jax.errors import InputError
from opd_jax.plan.compiling import Line
from opd_jax.plan.programs import OF_ROWS, SLOTS_OF, Programs

Build = Callable[[Config], Programs]
Compile = Callable[[Programs, list[str] | None], list[Line]]

_TRIES = 3  # of slots in a mesh: with refills prompts enter beside a whole cache
_MARGIN = 0.97  # of what is free: the compiler does not shrink its scratch space with the rows


@dataclasses.dataclass(frozen=True)
class Found:
    """A setting that fits: what to change, as overrides that can be pasted, and its table."""

    overrides: list[str]
    lines: list[Line]
    config: Config


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """The configuration with ``{"mesh.fsdp": 8, …}`` set.

    Raises:
        InputError: the result contradicts itself.
    """
    tree = config.model_dump(mode="json")
    for path, value in settings.items():
        *sections, leaf = path.split(".")
        node = tree
        for name in sections:
            node = node[name]
        node[leaf] = value
    return parse_config(tree)


def nearest(config: Config, build: Build, compiled: Compile, usable: int, devices: int) -> Found | None:
    """Tries meshes from the configuration's own to more and more sharded ones; None: nothing fits."""
    for mesh in meshes(config, devices):
        try:
            start = changed(config, mesh)
            programs = build(start)
        except InputError:
            continue
        if _floor(programs) > usable:
            continue
        settings = _fit(config, mesh, programs, build, compiled, usable)
        if settings is None:
            continue
        for _ in range(_TRIES):
            final = changed(config, settings)
            lines = compiled(build(final), None)
            if all(line.fits for line in lines if line.needed):
                return Found([f"{k}={v}" for k, v in settings.items()], lines, final)
            fewer = _fewer_slots(lines, build(final), usable)
            if not fewer:
                break
            settings |= fewer
    return None


def meshes(config: Config, devices: int) -> Iterator[dict[str, Any]]:
    """The mesh as it is, all of it fsdp, then fsdp × tensor with more and more tensor."""
    yield {}
    own = config.mesh
    tensor = max(own.tensor, 1)
    while tensor <= devices:
        sizes = {"mesh.data": 1, "mesh.fsdp": devices // tensor, "mesh.tensor": tensor}
        if devices % tensor == 0 and (own.data, own.fsdp, own.tensor) != tuple(sizes.values()):
            yield sizes
        tensor *= 2


def _floor(programs: Programs) -> int:
    """Bytes that no smaller pass, cache or batch takes away: the weights, and those for decoding beside them."""
    small = ("cache", "sequences", "teacher states")
    parts = [program.arguments | program.resident for program in programs.all()]
    return max(sum(v for k, v in p.items() if k not in small) for p in parts)


def _fit(
    config: Config, mesh: dict[str, Any], programs: Programs, build: Build, compiled: Compile, usable: int
) -> dict[str, Any] | None:
    """Passes, remat, slots and evaluation batch for a mesh; None: its fixed parts do not fit."""
    settings = dict(mesh)
    lines = {line.name: line for line in compiled(programs, None)}
    fixed = [name for name in lines if "weights" in name]
    if any(not lines[name].fits for name in fixed):
        return None
    if any(not lines[name].fits for name in OF_ROWS if name in lines):
        found = _smaller_passes(config, settings, lines, programs, build, compiled, usable)
        if found is None:
            return None
        settings = found
    fewer = _fewer_slots(list(lines.values()), programs, usable)
    return None if fewer is None else settings | fewer


def _fewer_slots(lines: list[Line], programs: Programs, usable: int) -> dict[str, Any] | None:
    """Slots and evaluation batch with which the caches fit, by the size of a slot; None: not one a shard does."""
    settings: dict[str, Any] = {}
    for line in lines:
        key = SLOTS_OF.get(line.name)
        if line.fits or key is None:
            continue
        now = programs.slots if key == "rollout.slots" else programs.shapes.evaluation_rows()
        shards = programs.shapes.shards
        slots = min(slots_that_fit(line, now, usable), now - shards) // shards * shards
        if slots <= 0:
            return None
        settings[key] = min(slots, settings.get(key, slots))
    return settings


def slots_that_fit(line: Line, slots: int, usable: int) -> int:
    """Slots for which the cache of a segment fits, all else as it is."""
    cache = line.parts["cache"]
    free = usable - (line.total - cache)
    return int(max(free, 0) * _MARGIN * slots / cache)


def _smaller_passes(
    config: Config,
    settings: dict[str, Any],
    lines: dict[str, Line],
    programs: Programs,
    build: Build,
    compiled: Compile,
    usable: int,
) -> dict[str, Any] | None:
    """The largest micro_batch that fits, or the smallest with full remat."""
    rows, least = config.rows, programs.shapes.shards
    names = [name for name in OF_ROWS if name in lines]

    def worst(try_: dict[str, Any]) -> dict[str, Line]:
        return {line.name: line for line in compiled(build(changed(config, try_)), names)}

    for remat in dict.fromkeys((config.remat, "full")):
        base = settings | ({"remat": remat} if remat != config.remat else {})
        smallest = worst(base | {"micro_batch": least})
        if not all(line.fits for line in smallest.values()):
            continue
        size = programs.micro_batch
        guess = min(_interpolated(smallest[n], least, lines[n], size, usable) for n in names)
        sizes = [m for m in range(least, size, least) if rows % m == 0 and m <= guess]
        if sizes and sizes[-1] > least and all(x.fits for x in worst(base | {"micro_batch": sizes[-1]}).values()):
            return base | {"micro_batch": sizes[-1]}
        return base | {"micro_batch": least}
    return None


def _interpolated(small: Line, m: int, large: Line, n: int, usable: int) -> float:
    """Rows a pass at which the total reaches what is usable, taking it as linear between two compilations."""
    slope = (large.total - small.total) / max(n - m, 1)
    return n if slope <= 0 else m + _MARGIN * (usable - small.total) / slope
