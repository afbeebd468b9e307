"""Experiments of one domain and one seed, in a process of their own, which ``suite`` starts."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from etils import epath
from filelock import FileLock, Timeout

from opd_jax.paper.experiments import EXPERIMENTS
from opd_jax.paper.lab import VERSION, Lab
from opd_jax.paper.presets import DOMAINS, PRESETS
from opd_jax.tracking.run_dir import write_atomically
from opd_jax.tracking.writers import plain


def result_path(results: Path, domain: str, experiment: str, seed: int) -> Path:
    return results / f"{domain}-{experiment}-seed{seed}.json"


def settings(preset: str, domain: str) -> dict[str, Any]:
    """What a stored result was made with."""
    sizes = PRESETS[preset]
    of_domain = dataclasses.asdict(DOMAINS[domain](sizes))
    return {"preset": preset, "version": VERSION} | dataclasses.asdict(sizes) | {"domain": of_domain}


def work(preset: str, domain: str, seed: int, experiments: list[str], out: Path, results: Path) -> list[str]:
    """Runs experiments one after the other and writes the file of each when it is done; returns what failed and why.

    Those that another process is at, or has done, it leaves alone.
    """
    lab, failed = Lab(DOMAINS[domain](PRESETS[preset]), PRESETS[preset], seed, out), []
    for name in experiments:
        path = result_path(results, domain, name, seed)
        try:
            with FileLock(out / f"{path.stem}.lock", blocking=False):
                if not path.exists():
                    row = {"experiment": name, "domain": domain, "seed": seed, "settings": settings(preset, domain)}
                    text = json.dumps(plain(row | EXPERIMENTS[name](lab)), allow_nan=False)
                    write_atomically(epath.Path(path), text + "\n")
        except Timeout:
            continue
        except Exception as e:  # the others do not depend on it
            traceback.print_exc()
            failed.append(f"{name}: {type(e).__name__}: {e}")
    return failed


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if failed := work(**given | {"out": Path(given["out"]), "results": Path(given["results"])}):
        sys.exit("; ".join(failed))
