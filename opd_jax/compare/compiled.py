"""What the update of each variant takes on a chip, from the compiler, and how many FLOPs it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax.compare.variants import Dropped, Variant
from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.mesh import make_mesh
from opd_jax.models.decoder import DecoderConfig
from opd_jax.plan import models_of
from opd_jax.plan.compiling import Line, compile_line
from opd_jax.plan.programs import Programs
from opd_jax.plan.topology import find_topology
from opd_jax.tracking.console import console
from opd_jax.training.throughput import update_flops

Row = dict[str, Any]


def compile_variants(variants: Sequence[Variant], dropped: Sequence[Dropped], topology_name: str) -> Row:
    """Compiles the updates of the variants for a topology that need not be there; nothing is loaded or run.

    Raises:
        InputError: unknown topology or model, libtpu missing, sizes that do not divide over the mesh.
    """
    topology = find_topology(topology_name)
    base = variants[0].config
    student, teacher = models_of(base)
    rows = compiled_updates(variants, topology.devices, topology.usable)
    for row, variant in zip(rows, variants, strict=True):
        row |= {
            "name": variant.name,
            "settings": variant.settings,
            "rows": variant.config.rows,
            "flops": longest_flops(variant.config, student, teacher),
        }
    return {
        "kind": "compare-compiled",
        "topology": topology.name,
        "chips": len(topology.devices),
        "usable_bytes": topology.usable,
        "mesh": dict(make_mesh(**base.mesh.model_dump(), devices=topology.devices).shape),
        "student": base.student.path,
        "teacher": base.teacher and base.teacher.path,
        "tokens": [base.data.max_prompt, base.rollout.max_response],
        "metrics_every": base.metrics_every,
        "metrics_k": base.overlap_k,
        "variants": rows,
        "dropped": [dataclasses.asdict(d) for d in dropped],
    }


def compiled_updates(
    variants: Sequence[Variant], devices: Sequence[Any], usable: int, vocab_size: int | None = None
) -> list[Row]:
    """Of each variant ``update``, as most steps run it, and ``measured``, with the metrics (None if all steps are)."""
    found: list[Row] = []
    with console.progress(len(variants), "compiling", unit="variant", show=("variant",)) as bar:
        for i, variant in enumerate(variants):
            bar.update(i, {"variant": variant.name})
            config = variant.config
            mesh = make_mesh(**config.mesh.model_dump(), devices=devices)
            programs = Programs(config, mesh, *models_of(config), vocab_size=vocab_size)
            rarely = config.metrics_every > 1
            found.append({
                "update": _row(compile_line(programs.update(measured=not rarely), usable)),
                "measured": _row(compile_line(programs.update(), usable)) if rarely else None,
            })  # fmt: skip
        bar.update(len(variants), {"variant": "done"})
    return found


def longest_flops(config: Config, student: DecoderConfig, teacher: DecoderConfig | None) -> float:
    """FLOPs of one update of texts that are as long as they may be, without metrics, on all chips together."""
    prompts, responses = (np.full(config.rows, n) for n in (config.data.max_prompt, config.rollout.max_response))
    return update_flops(config, student, teacher, prompts, responses, metrics=False)


def _row(line: Line) -> Row:
    names = ("total", "arguments", "temp", "over", "collectives", "seconds", "cpu_seconds")
    return {name: getattr(line, name) for name in names}


def local_updates(variants: Sequence[Variant], devices: Sequence[Any], vocab_size: int) -> list[Row] | None:
    """``compiled_updates`` for the devices of this process; None for forms of teaching that are not planned."""
    try:
        return compiled_updates(variants, devices, 2**62, vocab_size)
    except InputError as e:
        console.warn(f"no bytes from the compiler: {e}")
        return None
