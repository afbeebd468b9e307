"""A ``jax.profiler`` trace of some steps, for TensorBoard's profile plugin, xprof or Perfetto."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from etils import epath

from opd_jax.stores import is_remote, upload
from opd_jax.tracking.console import console


class StepTrace:
    """Names every step for a profiler, and traces the steps ``first … last`` into ``directory``.

    ``with StepTrace(run.profile, (3, 5)) as trace: … with trace.step(n): …``. Every process writes a file of its own. A
    run that ends, or is resumed, between the two steps traces what it makes of them. Stores are written at the end.
    """

    def __init__(self, directory: epath.Path, steps: Sequence[int] | None) -> None:
        self._directory, self._steps = directory, steps
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._active = False

    @contextlib.contextmanager
    def step(self, n: int) -> Iterator[None]:
        if self._steps and not self._active and self._steps[0] <= n <= self._steps[1]:
            self._start()
        with jax.profiler.StepTraceAnnotation("step", step_num=n):
            yield
        if self._steps and n >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Ends the trace, if it goes on, and writes it."""
        if not self._active:
            return
        self._active = False
        jax.profiler.stop_trace()
        if self._scratch:
            root = Path(self._scratch.name)
            for file in sorted(f for f in root.rglob("*") if f.is_file()):
                upload(file, self._directory / os.fspath(file.relative_to(root)))
            self._scratch.cleanup()
        console.print(
            f"profile of steps {self._steps[0]} to {self._steps[1]}: {self._directory}" if self._steps else ""
        )

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        # the profiler's own file systems hold no object store
        if is_remote(self._directory):
            self._scratch = tempfile.TemporaryDirectory(prefix="opd-jax-")
        jax.profiler.start_trace(self._scratch.name if self._scratch else os.fspath(self._directory))
        self._active = True
