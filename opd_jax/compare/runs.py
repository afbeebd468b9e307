"""The runs of a comparison: every variant with every seed, each in its own directory, none repeated."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from opd_jax.compare.variants import Variant
from opd_jax.config import Config
from opd_jax.config_files import dump_config
from opd_jax.errors import Failed, InputError, Interrupted
from opd_jax.tracking.console import console
from opd_jax.tracking.run_dir import Row, RunDir, check_resumable, read_rows, write_atomically
from opd_jax.training.loop import train

RECORD = "comparison.json"  # in the directory of a comparison: what is compared there
_NAMED_AT_MOST = 5


class Run(NamedTuple):
    variant: Variant
    seed: int
    place: RunDir
    config: Config

    @property
    def title(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def begun(self) -> bool:
        return self.place.config.exists()

    @property
    def done(self) -> bool:
        if not (self.begun and self.place.summary.exists()):
            return False
        return json.loads(self.place.summary.read_text())["steps"] == self.config.steps


def runs_of(variants: Sequence[Variant], seeds: int, out: Path) -> list[Run]:
    """Seed by seed, so that what there is after a while can be compared in pairs."""
    found = []
    for i in range(seeds):
        for variant in variants:
            place, seed = out / variant.directory / f"seed-{variant.config.seed + i}", variant.config.seed + i
            config = variant.config.model_copy(update={"run_dir": str(place), "seed": seed})
            found.append(Run(variant, seed, RunDir(epath.Path(place)), config))
    return found


def run_all(runs: Sequence[Run], out: Path, stop: threading.Event | None = None) -> None:
    """Trains what is not done yet; what was begun goes on from its last checkpoint.

    Raises:
        InputError: ``out`` holds something else; or what ``train`` refuses.
        Failed: variants of one seed did not make the same rollouts at step 1; or a run cannot go on.
        Interrupted: ``stop`` was set; the same call goes on.
    """
    record = _record(runs)
    fresh = _check_directory(out, record)
    begun = [run for run in runs if run.begun]
    for run in begun:
        check_resumable(run.place, dump_config(run.config))
    same = _SameRollouts()
    for run in begun:
        same.check(run, next((row for row in read_rows(run.place.metrics) if row["step"] == 1), None))
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(epath.Path(out / RECORD), json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror}). Give a directory that can.") from e
    waiting = [run for run in runs if not run.done]
    steps = sum(run.config.steps for run in runs if run not in waiting)
    if len(waiting) < len(runs):
        console.print(f"{out}: {len(runs) - len(waiting)} of {len(runs)} runs are done")
    with console.progress(sum(run.config.steps for run in runs), "all runs", start=steps) as bar:
        for run in waiting:

            def each_step(step: int, row: Row, run: Run = run, before: int = steps) -> None:
                if step == 1:
                    same.check(run, row)
                bar.update(before + step)

            try:
                train(run.config, resume=run.begun, title=run.title, stop=stop, each_step=each_step)
            except InputError:
                if fresh and not any(r.begun for r in runs):  # refused before anything was made
                    (out / RECORD).unlink()
                    if not existed:
                        with contextlib.suppress(OSError):
                            out.rmdir()
                raise
            except Interrupted as e:
                raise Interrupted(f"{run.title}: {str(e).partition(';')[0]}; give the same command to go on") from e
            steps += run.config.steps
            if stop and stop.is_set() and run is not waiting[-1]:
                raise Interrupted(f"stopped after {run.title}; give the same command to go on")


class _SameRollouts:
    """The first step of a seed samples before anything has been learnt: all variants have to make the same bits."""

    def __init__(self) -> None:
        self._of_seed: dict[int, tuple[str, Any]] = {}

    def check(self, run: Run, row: Row | None) -> None:
        if row is None:
            return
        name, rollouts = self._of_seed.setdefault(run.seed, (run.variant.name, row.get("rollouts")))
        if rollouts != row.get("rollouts"):
            raise Failed(
                f"seed {run.seed}: the first rollouts of {name} and {run.variant.name} differ (digests {rollouts} and "
                f"{row.get('rollouts')} of tokens and log-probabilities), so that a comparison would be of other "
                "rollouts. Leave out of --vary what changes the sampling; runs begun by another version, or on other "
                "devices, do not go on in the same directory either."
            )


def _record(runs: Sequence[Run]) -> Row:
    return {
        "variants": {
            run.variant.name: run.variant.config.model_dump(mode="json", exclude={"run_dir"})
            for run in runs
            if run.seed == runs[0].seed
        }
    }


def _check_directory(out: Path, record: Row) -> bool:
    """Whether it is new. Refuses one with anything but this comparison."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file. Give a directory.")
    if not out.exists() or all(p.suffix == ".tmp" for p in out.iterdir()):  # as a kill while writing RECORD leaves it
        return True
    if not (out / RECORD).exists():
        raise InputError(f"{out}: not empty, and no comparison is there. Give another --out.")
    held, given = (_leaves(x) for x in (json.loads((out / RECORD).read_text()), record))
    differing = [name for name in dict.fromkeys([*held, *given]) if held.get(name) != given.get(name)]
    if differing:
        lines = [
            f"  {name}: there {held.get(name, '(nothing)')!r}, now {given.get(name, '(nothing)')!r}"
            for name in differing[:_NAMED_AT_MOST]
        ]
        more = [f"  … and {len(differing) - _NAMED_AT_MOST} more"] if len(differing) > _NAMED_AT_MOST else []
        raise InputError("\n".join([f"{out}: holds another comparison:", *lines, *more, "Give another --out."]))
    return False


def _leaves(tree: Any, path: str = "") -> Row:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {k: v for name, node in tree.items() for k, v in _leaves(node, f"{path}.{name}".lstrip(".")).items()}
