"""``opd compare``: variants of one run under identical sharding, initialisation, prompts and random numbers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax

from opd_jax.compare.compiled import compile_variants, local_updates
from opd_jax.compare.result import Row, compare_runs
from opd_jax.compare.runs import run_all, runs_of
from opd_jax.compare.section import compiled_section, section
from opd_jax.compare.variants import Dropped, make_variants, shown
from opd_jax.config import Config
from opd_jax.data.tokenizers import load_tokenizer, valid_vocab_size
from opd_jax.errors import InputError
from opd_jax.mesh import make_mesh
from opd_jax.stores import is_remote
from opd_jax.tracking.console import console
from opd_jax.tracking.sections import show, write_analysis


def compare(
    config: Config, vary: Sequence[str], seeds: int, out: Path | None = None, stop: threading.Event | None = None
) -> Row:
    """Trains every variant with every seed below ``out`` (None: config.run_dir), goes on where that began, and writes
    compare.json, compare.html and plots there. The seeds are config.seed, config.seed + 1, ….

    Raises:
        InputError: no teacher or held-out prompts; what ``make_variants`` and ``train`` refuse; ``out`` holds
            something else.
        Failed: the variants did not sample the same at step 1.
        Interrupted: ``stop`` was set; the same call goes on.
    """
    _check_kind(config)
    if config.evaluation.data is None:
        raise InputError(
            "opd compare: no held-out prompts to compare on. Add evaluation.data={source: …} and, for curves, "
            "evaluation.every=N."
        )
    if out is None and is_remote(config.run_dir):
        raise InputError(f"opd compare: run_dir={config.run_dir} is in a store. Give a local directory, --out DIR.")
    variants, dropped = make_variants(config, vary)
    _announce([v.name for v in variants], dropped)
    out = out or Path(config.run_dir)
    runs = runs_of(variants, seeds, out)
    run_all(runs, out, stop)
    mesh = make_mesh(**config.mesh.model_dump())
    with console.stage("bytes of each update, from the compiler"):
        vocab_size = valid_vocab_size(load_tokenizer(config.student.path))
        memory = local_updates(variants, list(mesh.devices.flat), vocab_size)
    devices = ", ".join(f"{n} × {kind}" for kind, n in Counter(d.device_kind for d in jax.devices()).items())
    result = compare_runs(runs, dropped, memory, devices, mesh.shape)
    found = section(result)
    show(found)
    write_analysis(found, result, out)
    console.print(str(out / "compare.html"))
    return result


def compare_compiled(config: Config, vary: Sequence[str], topology: str, out: Path | None = None) -> Row:
    """The updates of the variants compiled for a topology side by side; nothing is loaded or run.

    Raises:
        InputError: no teacher; what ``make_variants`` and ``opd plan`` refuse.
    """
    _check_kind(config)
    variants, dropped = make_variants(config, vary)
    _announce([v.name for v in variants], dropped)
    result = compile_variants(variants, dropped, topology)
    found = compiled_section(result)
    show(found)
    if out:
        write_analysis(found, result, out)
    return result


def _check_kind(config: Config) -> None:
    if config.kind != "opd":
        raise InputError(f"opd compare: kind={config.kind}; variants are measured against a teacher. Set kind=opd.")


def _announce(names: Sequence[str], dropped: Sequence[Dropped]) -> None:
    console.print(f"{len(names)} variants: {', '.join(names)}")
    for d in dropped:
        console.print(f"left out: {shown(d.settings)}: {d.why}")
