"""Logs of a run as it goes: JSON lines, which are the record, and the same scalars for TensorBoard."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import os
import platform
import struct
import time
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import numpy as np
import yaml
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made by protobuf)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from opd_jax.errors import InputError
from opd_jax.tracking.run_dir import RunDir

_STORE_INTERVAL = 30.0  # seconds between rewrites of one object


class MetricWriter:
    """Appends rows to metrics.jsonl, samples.jsonl and evaluations.jsonl, and scalars to TensorBoard events.

    Every row is on disk when the call returns (in an object store: within 30 s, and at ``flush``). A value that is not
    finite becomes ``null``. Only process 0 writes; elsewhere every method does nothing.

    Args:
        restored_step: for a resumed run, as given to ``RunDir.truncate_after``; TensorBoard then hides later events.
        wandb: a project at Weights & Biases that gets the numbers, too (``pip install 'opd-jax[wandb]'``).

    Raises:
        InputError: wandb does not start.
    """

    def __init__(self, run: RunDir, restored_step: int | None = None, wandb: str | None = None) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._wandb = start_wandb(run, wandb) if wandb else None
        self._metrics, self._samples, self._evaluations = map(_AppendFile, (run.metrics, run.samples, run.evaluations))
        run.events.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self._events = _AppendFile(run.events / name)
        self._files = (self._metrics, self._samples, self._evaluations, self._events)
        self._write_event(Event(file_version="brain.Event:2"))
        if restored_step is not None:
            self._write_event(Event(step=restored_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl. Numbers also go to TensorBoard; lists (curves by position) do not."""
        if self._active:
            row = {name: plain(value) for name, value in metrics.items()}
            self._metrics.write_line({"step": int(step), **row})
            self._write_scalars(step, "", row)

    def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rollouts as text, one row each: problem, answer, response, correct, …"""
        if self._active:
            for row in rows:
                self._samples.write_line({"step": int(step), **plain(row)})

    def write_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """One row of evaluations.jsonl; ``evaluation["who"]`` is ``student`` or ``teacher``."""
        if self._active:
            row = plain(evaluation)
            self._evaluations.write_line({"step": int(step), **row})
            self._write_scalars(step, f"evaluation/{row.get('who', 'student')}/", row)

    def flush(self) -> None:
        """Brings an object store up to date; on a disk all is written already."""
        if self._active:
            for file in self._files:
                file.flush()

    def close(self) -> None:
        if self._active:
            if self._wandb:
                self._wandb.finish()
            for file in self._files:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_scalars(self, step: int, prefix: str, row: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._wandb:
            self._wandb.log({prefix + name: value for name, value in numbers.items()}, step=int(step))
        values = [Summary.Value(tag=prefix + name, simple_value=value) for name, value in numbers.items()]
        self._write_event(Event(step=int(step), summary=Summary(value=values)))

    def _write_event(self, event: Event) -> None:
        # Written here and not by SummaryWriter: that one queues events to a thread, which a kill loses, and cannot
        # write to the stores that epath can. The format is a TFRecord.
        event.wall_time = time.time()
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (header, data)]
        self._events.write(header + checks[0] + data + checks[1])


def check_wandb(project: str | None) -> None:
    """Raises InputError where a project is given and the package is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"wandb={project}: the package is not installed. pip install 'opd-jax[wandb]', or leave it out."
        )


def start_wandb(run: RunDir, project: str) -> Any:
    """The run of this directory at Weights & Biases, begun or, after a resume, taken up again.

    Raises:
        InputError: it does not start, as without network or login.
    """
    wandb = importlib.import_module("wandb")
    began = json.loads(run.environment.read_text())[0]["start_time"]
    try:
        return wandb.init(
            project=project,
            name=run.root.name,
            id=f"{run.root.name}-{zlib.crc32(f'{os.fspath(run.root)} {began}'.encode()):08x}",
            resume="allow",
            config=yaml.safe_load(run.config.read_text()),
            dir=os.fspath(run.root) if _is_local(run.root) else None,
            settings={"console": "off"},  # it would copy the live progress line, again and again
        )
    except (wandb.Error, OSError) as e:
        raise InputError(
            f"wandb={project}: Weights & Biases did not start ({str(e).strip() or type(e).__name__}). Log in by `wandb "
            f"login`, set WANDB_MODE=offline, or leave wandb out; then continue with --resume."
        ) from e


class _AppendFile:
    """Appends bytes. An object store cannot append: there the whole object is kept in memory and rewritten at times."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._local = _is_local(path)
        if self._local:
            self._file: Any = open(path, "ab")  # noqa: SIM115 (closed in close)
        else:
            self._file = io.BytesIO()
            self._file.write(path.read_bytes() if path.exists() else b"")
            self._stored_at = time.monotonic()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        if self._local:
            self._file.flush()
        elif time.monotonic() - self._stored_at > _STORE_INTERVAL:
            self._store()

    def write_line(self, row: Mapping[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        # A lone surrogate in a model's text becomes \udXXX, which is its JSON escape.
        self.write(text.encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        if not self._local:
            self._store()

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _store(self) -> None:
        self._path.write_bytes(self._file.getvalue())
        self._stored_at = time.monotonic()


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def plain(value: Any) -> Any:
    """Python values that are valid JSON: arrays become lists, what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
