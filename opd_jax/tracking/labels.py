"""What metrics are called, on the console and on axes, and how numbers are printed: one place for every output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple


class Label(NamedTuple):
    short: str  # console, table heads
    axis: str  # plots and reports, with its unit


LABELS: dict[str, Label] = {
    "loss": Label("loss", "loss"),
    "accuracy": Label("accuracy", "accuracy"),
    "reward": Label("reward", "reward"),
    "reverse_kl": Label("KL", "reverse KL (nats/token)"),
    "overlap_ratio": Label("overlap", "overlap ratio"),
    "entropy_gap": Label("entropy gap", "entropy gap (nats)"),
    "overlap_advantage": Label("advantage", "overlap-token advantage (nats)"),
    "overlap_mass_student": Label("mass (student)", "overlap mass, student"),
    "overlap_mass_teacher": Label("mass (teacher)", "overlap mass, teacher"),
    "student_entropy": Label("student entropy", "student entropy (nats)"),
    "teacher_entropy": Label("teacher entropy", "teacher entropy (nats)"),
    "forward_kl_teacher_rollouts": Label("forward KL (teacher)", "forward KL, teacher rollouts (nats/token)"),
    "forward_kl": Label("forward KL", "forward KL (nats/token)"),
    "argmax_agreement": Label("argmax", "agreement of the argmax"),
    "extreme_advantage_gap": Label("extreme gap", "p − q at the extreme advantage"),
    "token_accuracy": Label("token acc.", "token accuracy"),
    "skipped": Label("skipped", "updates skipped"),
    "gradient_norm": Label("|g|", "gradient norm"),
    "response_length": Label("length", "response length (tokens)"),
    "truncation_rate": Label("truncated", "truncated responses"),
    "eos_rate": Label("ended", "ended by end-of-sequence"),
    "learning_rate": Label("lr", "learning rate"),
    "tokens_per_second": Label("tok/s", "tokens per second"),
    "mfu": Label("MFU", "share of the bfloat16 peak (update)"),
    "padding": Label("padding", "padding (share of row tokens)"),
    "padding_unpacked": Label("padding (unpacked)", "padding without packing (share of row tokens)"),
}


def axis_label(name: str, k: int | None = None) -> str:
    """Full name with its unit; an unlisted metric is called by its key. ``k``: size of the overlap's top-k sets."""
    if name == "overlap_ratio" and k is not None:
        return f"overlap@{k}"
    return LABELS[name].axis if name in LABELS else name.replace("_", " ")


def short_label(name: str) -> str:
    return LABELS[name].short if name in LABELS else name.replace("_", " ")


def in_order(names: Iterable[str]) -> list[str]:
    """Listed metrics first, in the order of ``LABELS``; then the others by name."""
    rank = {name: i for i, name in enumerate(LABELS)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def format_value(value: Any) -> str:
    """A number at a precision that can be read; – for what is missing. A pair is (mean, standard error)."""
    if isinstance(value, tuple):
        mean, error = value
        if _missing(mean) or _missing(error):
            return format_value(mean)
        # as many decimals as the first digit of the error needs
        decimals = max(_decimals(mean), -math.floor(math.log10(error))) if error > 0 else _decimals(mean)
        if decimals <= 6:
            return f"{mean:,.{decimals}f} ± {error:,.{decimals}f}"
        return f"{format_value(mean)} ± {format_value(error)}"
    if _missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:,.{_decimals(value)}f}"


def format_interval(low: float | None, high: float | None) -> str:
    """Both bounds with the decimals that half their distance needs; – where one is missing."""
    if low is None or high is None or _missing(low) or _missing(high):
        return "–"
    half = (high - low) / 2
    decimals = max(_decimals(max(abs(low), abs(high))), -math.floor(math.log10(half))) if half > 0 else _decimals(low)
    if decimals > 6:
        return f"{format_value(low)} … {format_value(high)}"
    return f"{low:,.{decimals}f} … {high:,.{decimals}f}"


def format_duration(seconds: float) -> str:
    """4.2 s, 1:05 (minutes), 2:01:05 (hours)."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _decimals(value: float) -> int:
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        return 0
    return 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.01 or size == 0 else 4
