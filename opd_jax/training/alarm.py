"""Tells a collapse from noise: what of a run leaves its own running level in the direction in which runs die.

Long responses collapse from their end: entropy there leaves its level, overlap with the teacher falls, responses no
longer end, the gradient spikes (paper §6.1). Self-distillation from a mean that follows its student too fast dies the
other way: responses become empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]

LEVEL, RECENT = 20, 3  # logged steps that make the level, and that are held against it
FEWEST = 8  # steps of a level
DEVIATIONS = 6.0
GRADIENT = "log gradient norm"


class Signal(NamedTuple):
    name: str
    read: Callable[[Sequence[Row]], Sequence[float]]  # of rows, oldest first; NaN where there is none
    sign: int  # the bad direction; 0: both
    least: float  # a smaller shift is never an alarm


def _late_entropy(rows: Sequence[Row]) -> Sequence[float]:
    """Mean student entropy in nats of the last third of the positions that responses reached in each of the rows.

    Bins that only some rows reach are left out: one long response would move the mean from row to row.
    """
    curves = [row["student_entropy_by_position"] for row in rows if row.get("student_entropy_by_position")]
    values = np.array([[math.nan if x is None else x for x in curve] for curve in curves], np.float64)
    values = values[np.isfinite(values).any(1)][-LEVEL - RECENT :] if len(curves) else values.reshape(0, 1)
    reached = np.flatnonzero(np.isfinite(values).all(0))
    late = reached[-max(1, len(reached) // 3) :]
    return values[:, late].mean(1).tolist() if len(late) else []


def _value(name: str) -> Callable[[Sequence[Row]], Sequence[float]]:
    """NaN where a row has no number: in a file, what was not finite is null."""
    return lambda rows: [math.nan if row.get(name) is None else row[name] for row in rows]


def _log(name: str) -> Callable[[Sequence[Row]], Sequence[float]]:
    return lambda rows: [math.log(x) if x > 0 else math.nan for x in _value(name)(rows)]


SIGNALS = (
    Signal("late-position entropy", _late_entropy, 0, 0.5),
    Signal("overlap with the teacher", _value("overlap_ratio"), -1, 0.1),
    Signal("truncated responses", _value("truncation_rate"), 1, 0.2),
    Signal("log response length", _log("response_length"), -1, math.log(4)),
    Signal(GRADIENT, _log("gradient_norm"), 1, math.log(4)),
)


def collapse(history: Sequence[Row]) -> str | None:
    """What has left its level, in words, after the last of the logged rows; None while all is well.

    A signal has left its level where the median of its last 3 values is off the median of the 20 before by more than 6
    of their scaled median deviations, and by more than a size that matters. A gradient spike by itself is no collapse.
    """
    left = {signal.name: text for signal in SIGNALS if (text := _shift(signal, history))}
    return "; ".join(left.values()) if left.keys() - {GRADIENT} else None


def _shift(signal: Signal, history: Sequence[Row]) -> str | None:
    values = np.array(signal.read(history), np.float64)
    values = values[np.isfinite(values)][-LEVEL - RECENT :]
    if len(values) < FEWEST + RECENT:
        return None
    before, now = values[:-RECENT], float(np.median(values[-RECENT:]))
    level = float(np.median(before))
    noise = 1.4826 * float(np.median(np.abs(before - level)))
    shift = (now - level) * signal.sign if signal.sign else abs(now - level)
    least = max(signal.least, DEVIATIONS * noise)
    return f"{signal.name} went from {level:.2f} to {now:.2f}" if shift > least else None
