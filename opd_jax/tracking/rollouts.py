"""Sampled rollouts in a report: every token coloured by what student and teacher make of it, with both sides' lists.

What is known of a token stands in an attribute that the style sheet shows at the foot of the window while the token is
hovered over, tapped on, or reached by the Tab key; no script is needed.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from opd_jax.tracking.labels import format_value
from opd_jax.tracking.page import escape
from opd_jax.tracking.run_dir import Row

_PROBLEMS_SHOWN = 6  # with rollouts; the rest is in samples.jsonl
_TEXT_SHOWN = 20_000  # characters of one rollout without values by token, or between those with
_BY_TAB = 12  # tokens of a rollout that the Tab key reaches: those of the largest advantages
_ADVANTAGES = (0.2, 0.5, 1.0, 2.0, 4.0)  # |log q − log p| in nats, from which a token is coloured, and more strongly
_DIVERGENCES = (0.05, 0.2, 0.5, 1.0, 2.0)  # reverse KL in nats


def section(rows: Sequence[Row], of_run: str = "", runs: int = 1) -> str:
    """The same problems at the first and the last step that has samples, and the teacher's answer; "" without any.

    ``runs``: that share the report, which stays as small.
    """
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return ""
    by_problem: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        teacher = row.get("who") == "teacher"
        if teacher or row["step"] in (steps[0], steps[-1]):
            by_problem[str(row.get("problem", ""))].setdefault("teacher" if teacher else f"step {row['step']}", row)
    # Problems sampled at both ends tell most.
    problems = sorted(by_problem.items(), key=lambda item: -len(item[1]))
    most = max(1, _PROBLEMS_SHOWN // runs)
    shown = "".join(_problem(text, answers) for text, answers in problems[:most])
    hidden = max(0, len(problems) - most)
    note = f'<p class="soft">{hidden} more problems are in samples.jsonl.</p>' if hidden else ""
    heading = f"<h2>Sampled rollouts{escape(of_run)}</h2>"
    css = "samples" if any(row.get("logp") for row in rows) else "samples only-kl"
    return f'<section class="{css}">{heading}{_legend(rows, of_run)}{shown}{note}</section>'


def _legend(rows: Sequence[Row], of_run: str) -> str:
    if any(row.get("logp") for row in rows):
        name = escape(f"colour{of_run}")
        less, more = (
            " ".join(f'<span class="{side}{i}">{edge:g}</span>' for i, edge in enumerate(_ADVANTAGES, 1))
            for side in "np"
        )
        return (
            '<fieldset class="soft legend"><legend>Colour of a token</legend>'
            f'<label><input type="radio" name="{name}" checked> advantage, log q − log p in nats: the teacher wants it '
            f"less {less}, more {more}</label> "
            f'<label><input type="radio" name="{name}" class="by-kl"> reverse KL there, nats: {_edges()}</label>'
            "<p>Point at a token, or tap on it, for p (student), q (teacher) and the most probable tokens of both.</p>"
            "</fieldset>"
        )
    if any(row.get("kl_by_token") for row in rows):
        return f'<p class="soft legend">Reverse KL of a token, nats: {_edges()}</p>'
    return ""


def _edges() -> str:
    return " ".join(f'<span class="k{i}">{edge:g}</span>' for i, edge in enumerate(_DIVERGENCES, 1))


def _problem(text: str, rollouts: dict[str, Row]) -> str:
    rows = dict(sorted(rollouts.items(), key=lambda item: item[0] == "teacher"))
    answer = next((row["answer"] for row in rows.values() if row.get("answer") is not None), None)
    expected = f'<p class="soft">Expected answer: {escape(answer)}</p>' if answer is not None else ""
    cards = "".join(_rollout(name, row) for name, row in rows.items())
    return f'<section class="card problem"><p>{escape(text)}</p>{expected}<div class="pair">{cards}</div></section>'


def _rollout(name: str, row: Row) -> str:
    marks = [f"<b>{escape(name)}</b>"]
    if row.get("correct") is not None:
        marks.append('<span class="right">✓ correct</span>' if row["correct"] else '<span class="wrong">✗ wrong</span>')
    kl = [v for v in row.get("kl_by_token") or [] if v is not None]
    if kl:
        n, tokens = len(kl), max(len(kl), len(row.get("tokens") or []))
        count = f"{n} tokens" if n == tokens else f"first and last {n // 2} of {tokens:,} tokens"
        marks.append(f"<span>reverse KL {format_value(statistics.fmean(kl))} nats/token, {count}</span>")
    response = str(row.get("response", ""))
    text = _coloured(row) or _cut(response)
    return f'<div class="rollout"><header>{"".join(marks)}</header><pre>{text}</pre></div>'


def _cut(text: str) -> str:
    left = len(text) - _TEXT_SHOWN
    return escape(text) if left <= 0 else f"{escape(text[:_TEXT_SHOWN])}\n… {left:,} more characters in samples.jsonl"


def _coloured(row: Row) -> str:
    """The tokens as they stand, those with values coloured; "" where the row has no values that fit its tokens."""
    tokens, kl = list(map(str, row.get("tokens") or [])), row.get("kl_by_token") or []
    if not tokens or not kl or len(kl) > len(tokens) or (len(kl) < len(tokens) and len(kl) % 2):
        return ""
    columns = [row.get(name) or [] for name in ("logp", "logq", "top_student", "top_teacher")]
    whole = all(len(column) == len(kl) for column in columns)
    known = [_Token(*values) for values in zip(kl, *columns, strict=True)] if whole else [_Token(x) for x in kl]
    strongest = sorted(range(len(known)), key=lambda i: -abs(known[i].advantage or 0))[:_BY_TAB]
    reached = {i for i in strongest if known[i].advantage}
    n = len(known)
    first = n if n == len(tokens) else n // 2
    last = len(tokens) - (n - first)
    spans = [known[i].span(tokens[i if i < first else i - n + len(tokens)], i in reached) for i in range(n)]
    return "".join([*spans[:first], _cut("".join(tokens[first:last])), *spans[first:]])


class _Token:
    """What a sample row knows of one token; of rows of older runs the reverse KL alone."""

    def __init__(self, kl: Any, logp: Any = None, logq: Any = None, student: Any = (), teacher: Any = ()) -> None:
        self.kl, self.logp, self.logq, self.lists = kl, logp, logq, {"student": student, "teacher": teacher}
        self.advantage = None if logp is None or logq is None else logq - logp

    def span(self, text: str, by_tab: bool) -> str:
        classes = []
        if self.advantage is not None and (level := _level(abs(self.advantage), _ADVANTAGES)):
            classes.append(f"{'n' if self.advantage < 0 else 'p'}{level}")
        if level := _level(self.kl, _DIVERGENCES):
            classes.append(f"k{level}")
        css = f' class="{" ".join(classes)}"' if classes else ""
        return f'<span{css} tabindex="{0 if by_tab else -1}" data-t="{escape(self._words(text))}">{escape(text)}</span>'

    def _words(self, text: str) -> str:
        first = [f"`{_visible(text)}`"]
        for name, log in (("p", self.logp), ("q", self.logq)):
            if log is not None:
                first.append(_pair(name, f"{math.exp(min(log, 0.0)):.3g}"))  # rounding may leave a log above 0
        if self.advantage is not None:
            first.append(_pair("log q − log p", f"{self.advantage:+.2f}"))
        if self.kl is not None:
            first.append(_pair("KL", format_value(self.kl)))
        lists = [
            f"{who}: " + "  ".join(_pair(f"`{_visible(t)}`", _probability(p)) for t, p in held)
            for who, held in self.lists.items()
            if held
        ]
        return "\n".join(["  ".join(first), *lists])


def _pair(name: str, value: str) -> str:
    return f"{name} {value}".replace(" ", "\xa0")  # a narrow page breaks the line between pairs


def _visible(text: Any) -> str:
    return str(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _probability(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"


def _level(value: float | None, edges: Sequence[float]) -> int:
    return 0 if value is None else sum(value >= edge for edge in edges)
