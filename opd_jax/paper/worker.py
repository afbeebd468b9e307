"""The experiments of one domain and one seed, in a process of their own, which ``suite`` starts."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from etils import epath

from opd_jax.errors import InputError
from opd_jax.paper.experiments import EXPERIMENTS
from opd_jax.paper.lab import VERSION, Lab
from opd_jax.paper.presets import DOMAINS, PRESETS
from opd_jax.tracking.run_dir import write_atomically
from opd_jax.tracking.writers import plain


def result_path(results: Path, domain: str, experiment: str, seed: int) -> Path:
    return results / f"{domain}-{experiment}-seed{seed}.json"


def settings(preset: str) -> dict[str, Any]:
    """What a stored result was made with."""
    return {"preset": preset, "version": VERSION} | dataclasses.asdict(PRESETS[preset])


def work(preset: str, domain: str, seed: int, experiments: list[str], out: Path, results: Path) -> None:
    """Runs experiments one after the other and writes the file of each when it is done."""
    lab = Lab(DOMAINS[domain](PRESETS[preset]), PRESETS[preset], seed, out)
    for name in experiments:
        row = {"experiment": name, "domain": domain, "seed": seed, "settings": settings(preset)}
        text = json.dumps(plain(row | EXPERIMENTS[name](lab)), allow_nan=False)
        write_atomically(epath.Path(result_path(results, domain, name, seed)), text + "\n")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        work(**given | {"out": Path(given["out"]), "results": Path(given["results"])})
    except InputError as e:
        sys.exit(f"error: {e}")
