"""The run directory: one place for all that a run reads again or leaves behind, safe against a kill at any moment."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from etils import epath

from opd_jax.errors import InputError
from opd_jax.stores import store_path

Row = dict[str, Any]

_PACKAGES = ("opd-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
# More steps continue a run; the others do not change what it computes.
_MAY_CHANGE = {"steps", "run_dir", "profile", "wandb", "checkpoint.export_best", "checkpoint.push"}
_NAMED_AT_MOST = 5


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths of a run; ``root`` may be local or in an object store (``gs://…``)."""

    root: epath.Path

    @property
    def config(self) -> epath.Path:
        return self.root / "config.yaml"

    @property
    def environment(self) -> epath.Path:
        """JSON list, one entry per start of the run."""
        return self.root / "environment.json"

    @property
    def metrics(self) -> epath.Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> epath.Path:
        return self.root / "samples.jsonl"

    @property
    def evaluations(self) -> epath.Path:
        return self.root / "evaluations.jsonl"

    @property
    def events(self) -> epath.Path:
        return self.root / "events"

    @property
    def checkpoints(self) -> epath.Path:
        return self.root / "checkpoints"

    @property
    def best(self) -> epath.Path:
        """The student of the best checkpoint as a Hugging Face directory (``checkpoint.export_best``)."""
        return self.root / "best"

    @property
    def summary(self) -> epath.Path:
        """Of a run that has ended: its steps, and seconds by stage, those after its last step included."""
        return self.root / "summary.json"

    @property
    def skipped(self) -> epath.Path:
        """Rows of updates whose loss or gradient was not finite, as .npz."""
        return self.root / "skipped"

    @property
    def profile(self) -> epath.Path:
        return self.root / "profile"

    @property
    def analysis(self) -> epath.Path:
        """Results of ``opd analyze`` about this run, one JSON file each."""
        return self.root / "analysis"

    @property
    def report(self) -> epath.Path:
        return self.root / "report.html"

    def truncate_after(self, step: int) -> None:
        """Drops rows with step > ``step`` and half-written lines, so that a resumed run has no row twice.

        ``step`` is the restored one; -1 (no checkpoint was there) empties the logs. Call it before the writer opens.
        """
        if jax.process_index() != 0:
            return
        for path in (self.metrics, self.samples, self.evaluations):
            if path.exists():
                kept = [line for line, row in _parsed_lines(path) if row["step"] <= step]
                write_atomically(path, "".join(line + "\n" for line in kept))


def open_run(path: epath.PathLike, config_yaml: str, resume: bool) -> RunDir:
    """Creates a run directory, or takes up an existing one; writes config.yaml and environment.json.

    ``config_yaml`` is the resolved configuration. A resumed run must have the same one, save that ``steps`` may be
    raised and ``run_dir`` may differ. On a pod only process 0 checks and writes; all get the same paths.

    Raises:
        InputError: a run is already there (fresh), none is there or its configuration differs (resume), or the
            directory cannot be written or is in an unknown kind of store.
    """
    run = RunDir(store_path(path))
    if jax.process_index() != 0:
        return run
    try:
        if resume:
            check_resumable(run, config_yaml)
        elif run.root.exists() and any(not p.name.endswith(".tmp") for p in run.root.iterdir()):
            raise InputError(
                f"{run.root}: the run directory is not empty. Continue that run with --resume, or give another run_dir."
            )
        run.root.mkdir(parents=True, exist_ok=True)
        starts = json.loads(run.environment.read_text()) if run.environment.exists() else []
        # config.yaml first: a kill between the two files leaves a directory that --resume accepts.
        write_atomically(run.config, config_yaml)
        write_atomically(run.environment, json.dumps([*starts, describe_environment()], indent=2) + "\n")
    except OSError as e:
        raise InputError(f"{run.root}: cannot use this run directory ({e}). Give a run_dir that can be written.") from e
    return run


def existing_run(path: epath.PathLike) -> RunDir:
    """The run at ``path``, to be read. Raises InputError where there is none."""
    run = RunDir(epath.Path(path))
    if not run.config.exists():
        raise InputError(f"{run.root}: no run here (no config.yaml). Give the run_dir of a run.")
    return run


def names_of(runs: Sequence[RunDir]) -> list[str]:
    """Names of directories; paths where two have the same name."""
    names = [run.root.name or str(run.root) for run in runs]
    return [str(run.root) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def keep_rows(directory: epath.Path, name: str, rows: Any) -> None:
    """The arrays of a pytree with named fields, as ``directory/name.npz``."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {field: np.asarray(x) for field, x in vars(rows).items() if hasattr(x, "shape")}
    with (directory / f"{name}.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def write_summary(run: RunDir, steps: int, after_last: Row) -> None:
    """summary.json; ``after_last``: the times that came after the row of the last step."""
    seconds: Counter[str] = Counter()
    for row in [*read_rows(run.metrics), after_last]:
        seconds.update({k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/") and v})
    rounded = {stage: round(total, 3) for stage, total in seconds.items()}
    write_atomically(run.summary, json.dumps({"steps": steps, "seconds": rounded}, indent=2) + "\n")


def read_rows(path: epath.Path) -> list[Row]:
    """Rows of a JSONL log; [] where there is none. A line that a kill cut short is left out."""
    return [row for _, row in _parsed_lines(path)] if path.exists() else []


def write_atomically(path: epath.Path, text: str) -> None:
    """A reader, or a run after a kill, sees the old file or the new one, never a part."""
    temporary = path.parent / f".{path.name}.tmp"
    # A lone surrogate in a model's text becomes \udXXX, which is its JSON escape.
    temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    temporary.replace(path)


def describe_environment() -> Row:
    """Versions, hardware, git revision, command line and time: what is needed to tell two runs apart."""
    devices = jax.devices()
    return {
        "start_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "devices": dict(Counter(d.device_kind for d in devices)),
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def check_resumable(run: RunDir, config_yaml: str) -> None:
    """Refuses to resume a run with another configuration; ``_MAY_CHANGE`` may differ, and ``steps`` be raised."""
    if not run.config.exists():
        raise InputError(f"{run.root}: no run to resume (no config.yaml). Start it without --resume, or mend run_dir.")
    stored, given = (_leaves(yaml.safe_load(text)) for text in (run.config.read_text(), config_yaml))
    differing = [
        f"  {name}: the run has {stored.get(name, '(nothing)')!r}, now {given.get(name, '(nothing)')!r}"
        for name in sorted(stored.keys() | given.keys())
        if name not in _MAY_CHANGE and stored.get(name, _ABSENT) != given.get(name, _ABSENT)
    ]
    if stored.get("steps", 0) > given.get("steps", 0):
        differing.append(f"  steps: the run has {stored['steps']}, now {given.get('steps')}; it may only be raised")
    if differing:
        more = f"\n  … and {len(differing) - _NAMED_AT_MOST} more" if len(differing) > _NAMED_AT_MOST else ""
        raise InputError(
            f"{run.root}: the configuration differs from that of the run to resume:\n"
            + "\n".join(differing[:_NAMED_AT_MOST])
            + f"{more}\nResume with {run.config}, or start a new run in another run_dir."
        )


_ABSENT = object()


def _leaves(tree: Any, path: str = "") -> Row:
    """Nested mapping → {"a.b": leaf}; an empty mapping or a list is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {k: v for name, node in tree.items() for k, v in _leaves(node, f"{path}.{name}".lstrip(".")).items()}


def _parsed_lines(path: epath.Path) -> list[tuple[str, Row]]:
    parsed = []
    # A kill may cut a UTF-8 sequence. Not splitlines: U+2028 may stand inside a model's text.
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            parsed.append((line, row))
    return parsed


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():  # an installed package inside somebody's repository is not that repository
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The processor as the kernel names it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
