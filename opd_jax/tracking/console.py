"""What people see while a command runs: stages, progress with rate and time left, tables, errors."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
from rich.progress import Progress as LiveProgress
from rich.table import Column, Table, box
from rich.text import Text

from opd_jax.tracking.labels import format_duration, format_value, short_label

SHOWN = ("loss", "reverse_kl", "overlap_ratio", "accuracy", "tokens_per_second")
"""Metrics of a row that the progress line names; the rest of the row is for the logs."""

_RATE_WINDOW = 20  # updates from which rate and time left are taken
_LINE_INTERVAL = 2.0  # seconds, least time between two plain lines
_LINE_AT_LEAST = 60.0  # seconds, most time between them
_LINES_WANTED = 100  # plain lines of a long run


class Console:
    """The one way out to people. On a terminal progress is live; in a pipe or a log file it is plain lines.

    Safe to use from several threads: bars that are open at the same time share one live display.
    """

    def __init__(self, terminal: Terminal | None = None, errors: Terminal | None = None) -> None:
        # A pipe has no width; rich would wrap tables at 80.
        width = None if sys.stdout.isatty() else shutil.get_terminal_size((120, 40)).columns
        self.terminal = terminal or Terminal(width=width, highlight=False)
        self._errors = errors or Terminal(stderr=True, highlight=False)
        self._lock = threading.Lock()
        self._live: LiveProgress | None = None
        self._open_bars = 0

    def print(self, text: str = "", style: str = "") -> None:
        """One line of plain text; square brackets are not markup."""
        self.terminal.print(Text(text, style=style), soft_wrap=True)

    def warn(self, message: str) -> None:
        self._errors.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)

    def error(self, message: str) -> None:
        self._errors.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Cells are text, numbers, None (–) or pairs (mean, standard error). The first column is left-aligned."""
        table = Table(
            title=Text(title, style="bold not italic"), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False
        )
        for i, name in enumerate(columns):
            table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(format_value(cell)) for cell in row))
        self.terminal.print(table)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Heads a stage of a longer job and, at its end, says how long it took."""
        start = time.monotonic()
        self.terminal.print(Text.assemble(("▸ ", "bold cyan"), (name, "bold")), soft_wrap=True)
        try:
            yield
        except BaseException:
            self._ended("✗", "red", name, "stopped after", start)
            raise
        self._ended("✓", "green", name, "", start)

    @contextlib.contextmanager
    def progress(
        self, total: int, title: str, start: int = 0, unit: str = "step", show: Sequence[str] = SHOWN
    ) -> Iterator[Progress]:
        """A bar over ``total`` units, ``start`` of which are done. ``show``: which of the given metrics to name.

        ``with console.progress(total=120, title="OPD") as p: p.update(step, {"loss": 0.4, …})``
        """
        live = self._acquire_live()
        bar = Progress(self.terminal, live, total, title, start, unit, show)
        try:
            yield bar
        finally:
            bar.close()
            self._release_live()

    def _ended(self, mark: str, colour: str, name: str, verb: str, start: float) -> None:
        took = f"  {verb} {format_duration(time.monotonic() - start)}".replace("   ", "  ")
        self.terminal.print(Text.assemble((f"{mark} ", f"bold {colour}"), name, (took, "dim")), soft_wrap=True)

    def _acquire_live(self) -> LiveProgress | None:
        if not self.terminal.is_terminal or self.terminal.is_dumb_terminal:
            return None
        with self._lock:
            if self._live is None:
                live = LiveProgress(
                    SpinnerColumn(style="cyan"),
                    _Field("title", style="bold"),
                    BarColumn(bar_width=12, complete_style="cyan", finished_style="cyan"),
                    _Field("count"),
                    _Field("metrics", ratio=1),
                    _Timing(),
                    console=self.terminal,
                    transient=True,  # a closed bar leaves its own permanent line
                    expand=True,
                    refresh_per_second=5,
                )
                live.start()
                self._live = live
            self._open_bars += 1
            return self._live

    def _release_live(self) -> None:
        with self._lock:
            if self._live is None:
                return
            self._open_bars -= 1
            if not self._open_bars:
                self._live.stop()
                self._live = None


class Progress:
    """One bar; made by ``Console.progress``."""

    def __init__(
        self,
        terminal: Terminal,
        live: LiveProgress | None,
        total: int,
        title: str,
        start: int,
        unit: str,
        show: Sequence[str],
    ) -> None:
        self._terminal, self._live, self._total, self._title = terminal, live, total, title
        self._unit, self._show, self._step, self._metrics = unit, show, start, ""
        self._began = self._printed_at = time.monotonic()
        self._printed_step = start
        # Filled by updates, not by the start: the first step holds the compilation, which would spoil the rate.
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RATE_WINDOW)
        if live is not None:
            fields = {"count": f"{start:,}/{total:,}", "metrics": "", "bar": self}
            self._task = live.add_task("", total=total, completed=start, title=title, **fields)

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """``step`` units are done now; metrics that are not given keep their last shown text."""
        now = time.monotonic()
        self._step = step
        if not self._recent or step != self._recent[-1][0]:  # the same step again only brings newer metrics
            self._recent.append((step, now))
        if metrics:
            self._metrics = "  ".join(_shown(name, metrics[name]) for name in self._show if name in metrics)
        if self._live is not None:
            count = f"{step:,}/{self._total:,}"
            self._live.update(self._task, completed=step, count=count, metrics=self._metrics)
        elif self._line_is_due(now):
            self._print_line(self.timing())

    def advance(self, metrics: Mapping[str, Any] | None = None) -> None:
        """One more unit is done."""
        self.update(self._step + 1, metrics)

    def timing(self) -> str:
        """Rate and time left; before the second update only the time since the start."""
        rate = self.rate()
        if rate is None:
            return format_duration(time.monotonic() - self._began)
        speed = f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self._unit}"
        # What is left ticks down between two updates, so that a slow step does not look like a stop.
        left = (self._total - self._step) / rate - (time.monotonic() - self._recent[-1][1])
        return f"{speed}  {format_duration(max(left, 0.0))} left"

    def rate(self) -> float | None:
        """Units per second over the last updates."""
        if len(self._recent) < 2:
            return None
        (first, begin), (last, end) = self._recent[0], self._recent[-1]
        return (last - first) / (end - begin) if last > first and end > begin else None

    def close(self) -> None:
        """Takes the live line away and leaves a permanent one with the time taken."""
        if self._live is not None:
            self._live.remove_task(self._task)
        if self._live is not None or self._printed_step != self._step or self._step == self._total:
            self._print_line(f"took {format_duration(time.monotonic() - self._began)}")

    def _line_is_due(self, now: float) -> bool:
        """Every 2 s at most, every minute at least, in between once per hundredth of the run; the end is close's."""
        waited = now - self._printed_at
        moved = self._step - self._printed_step >= self._total / _LINES_WANTED
        return self._step < self._total and waited >= _LINE_INTERVAL and (moved or waited >= _LINE_AT_LEAST)

    def _print_line(self, timing: str) -> None:
        self._printed_at, self._printed_step = time.monotonic(), self._step
        parts = [f"  {self._title}", f"{self._step:,}/{self._total:,}", self._metrics]
        line = Text("  ".join(p for p in parts if p)).append(f"  {timing}", style="dim")
        self._terminal.print(line, soft_wrap=True)


class _Field(ProgressColumn):
    """Plain text from a field of the task; what does not fit is cut, never wrapped."""

    def __init__(self, name: str, style: str = "", ratio: int | None = None) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis", ratio=ratio))
        self._name, self._style = name, style

    def render(self, task: Task) -> Text:
        return Text(task.fields[self._name], style=self._style)


class _Timing(ProgressColumn):
    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))

    def render(self, task: Task) -> Text:
        return Text(task.fields["bar"].timing(), style="dim")


def _shown(name: str, value: Any) -> str:
    return f"{short_label(name)} {format_value(value)}"


console = Console()
"""The console of the process."""
