"""``opd paper``: the paper's experiments in miniature, several seeds side by side, and what they say of its claims.

A finished (domain, experiment, seed) is one JSON file; what has its file is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError, Interrupted
from opd_jax.paper.claims import CLAIMS, verdict
from opd_jax.paper.page import HEADS, judged, read_reasons, table_rows, write_page
from opd_jax.paper.worker import result_path, settings
from opd_jax.tracking.console import console

Row = dict[str, Any]
Key = tuple[str, int]  # domain and seed

# All claims are examined on folds, those that a second domain is to bear out on products, too.
PLAN: Mapping[str, Sequence[str]] = {
    "folds": list(dict.fromkeys(claim.experiment for claim in CLAIMS)),
    "products": ["3.2", "4.1", "4.2"],
}
# Nine runs of code that folds has run already.
LEFT_OUT = {"smoke": [("products", "4.2")]}


def tell(rows: Sequence[Row], results: Path) -> Row:
    """Shows what the rows say of the claims, and writes the page ``results``.md with figures in ``results``."""
    found = judged(rows)
    console.table("claims of the paper, in miniature", HEADS, table_rows(found))
    page = results.with_name(f"{results.name}.md")
    preset = rows[0]["settings"]["preset"]
    write_page(rows, found, page, results, f"opd paper --preset {preset}")
    console.print(f"every effect with its interval: {page}")
    return {
        "preset": preset,
        "seeds": sorted({row["seed"] for row in rows}),
        "claims": [
            {"claim": claim.number, "experiment": claim.experiment, "domain": domain, "verdict": verdict(checks)}
            | {"checks": [dataclasses.asdict(check) | {"verdict": check.verdict} for check in checks]}
            for claim, domain, checks in found
        ],
    }


def run_experiments(
    preset: str,
    seeds: Sequence[int],
    only: Sequence[str],
    out: Path,
    results: Path,
    workers: int,
    stop: threading.Event | None = None,
) -> tuple[list[Row], str]:
    """Does what is not done yet; returns the rows of all that ``results`` then holds, and what failed, if any.

    Args:
        only: experiments by section; empty: all.
        out: directory of models and runs.
        results: directory of the result files.

    Raises:
        InputError: unknown experiment; other settings; bad ``reasons.yaml``; a directory that cannot be made.
        Interrupted: ``stop`` was set; what is done stays done.
    """
    known = PLAN["folds"]
    for name in only:
        if name not in known:
            raise InputError(f"--only {name}: unknown experiment; expected some of {', '.join(known)}")
    wanted = [
        (domain, experiment, seed)
        for domain, experiments in PLAN.items()  # the long ones first: the short ones fill the workers at the end
        for seed in seeds
        for experiment in experiments
        if (not only or experiment in only) and (domain, experiment) not in LEFT_OUT.get(preset, ())
    ]
    read_reasons(results)
    done = {(row["domain"], row["experiment"], row["seed"]) for row in _stored(results, preset)}
    jobs: dict[Key, list[str]] = {}
    for each in wanted:
        if each not in done:
            domain, experiment, seed = each
            jobs.setdefault((domain, seed), []).append(experiment)
    failed = ""
    if jobs:
        for option, place in (("--out", out), ("--results", results)):
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise InputError(f"{option} {place}: cannot be made ({e.strerror}). Give another directory.") from e
        failed = _run_all(jobs, preset, out, results, workers, len(wanted), stop)
    return _stored(results, preset), failed


def _stored(results: Path, preset: str) -> list[Row]:
    rows = [
        _read(path, preset, domain)
        for domain, experiments in PLAN.items()
        for experiment in experiments
        for path in sorted(results.glob(f"{domain}-{experiment}-seed*.json"))
    ]
    return sorted(rows, key=lambda row: row["seed"])


def _read(path: Path, preset: str, domain: str) -> Row:
    try:
        row = json.loads(path.read_text())
        made_with = row["settings"]["preset"]
    except (ValueError, LookupError, TypeError) as e:
        raise InputError(f"{path}: no result of `opd paper` ({type(e).__name__}: {e}). Remove the file.") from e
    if row["settings"] != settings(preset, domain):
        raise InputError(
            f"{path}: made with other settings (preset {made_with}) than --preset {preset} has now. "
            "Give another --results, or remove the file."
        )
    return row


def _run_all(
    jobs: Mapping[Key, list[str]],
    preset: str,
    out: Path,
    results: Path,
    workers: int,
    total: int,
    stop: threading.Event | None,
) -> str:
    paths = {key: [result_path(results, key[0], name, key[1]) for name in names] for key, names in jobs.items()}
    waiting, running, started, failed = list(jobs), [], Counter(), set()
    begun = done = total - sum(map(len, paths.values()))

    def left(key: Key) -> int:
        return sum(not path.exists() for path in paths[key])

    def to_help() -> Key | None:
        """A job with more to do than processes at it."""
        at = Counter(key for key, _ in running)
        more = [key for key in at if left(key) > at[key] and started[key] < workers]
        return max(more, key=left, default=None)

    try:
        with console.progress(total, "paper", start=begun, unit="experiment", show=()) as bar:
            while waiting or running:
                while len(running) < workers and (key := waiting.pop(0) if waiting else to_help()):
                    names = jobs[key][:: -1 if started[key] % 2 else 1]  # who helps begins at the other end
                    given = {"preset": preset, "domain": key[0], "seed": key[1], "experiments": names}
                    running.append((key, _start(given, out, results, workers)))
                    started[key] += 1
                time.sleep(0.5)
                ended = [(key, process) for key, process in running if process.poll() is not None]
                failed |= {_log(out, *key) for key, process in ended if process.returncode}
                running = [each for each in running if each not in ended]
                if (now := total - sum(map(left, jobs))) > done:
                    done = now
                    bar.update(done)
                if stop is not None and stop.is_set():
                    raise Interrupted(f"stopped after {done} of {total} experiments; the same command goes on")
    finally:
        for _, process in running:
            process.terminate()
    if not failed:
        return ""
    tails = "\n".join(f"{log}: {_last_line(log)}" for log in sorted(failed))
    return f"{len(failed)} of {len(jobs)} workers failed; the same command goes on where they stopped.\n{tails}"


def _start(given: Row, out: Path, results: Path, workers: int) -> subprocess.Popen[bytes]:
    # Models this small do not gain from a second thread; seeds side by side do.
    threads = max(1, (os.cpu_count() or 1) // workers)
    flags = f"--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads={threads}" if threads == 1 else ""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [
        sys.executable,
        "-m",
        "opd_jax.paper.worker",
        json.dumps(given | {"out": str(out), "results": str(results)}),
    ]
    with _log(out, given["domain"], given["seed"]).open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )


def _log(out: Path, domain: str, seed: int) -> Path:
    return out / f"{domain}-seed{seed}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"
