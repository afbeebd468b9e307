"""What graded responses amount to: the numbers of one evaluation, in a run or apart from it, and their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from opd_jax.evaluation.answers import Found, Verdict, normalise
from opd_jax.evaluation.scores import Score, avg_at_k, maj_at_k, pass_at_k, summarise
from opd_jax.tracking.labels import format_value

Row = dict[str, Any]

FOUND_RATES: dict[Found, str] = {
    "boxed": "boxed_rate",
    "answer": "answer_line_rate",
    "number": "last_number_rate",
    "none": "no_answer_rate",
}
COLUMNS = ("benchmark", "problems", "avg@k", "95 % interval", "pass@k", "maj@k", "length", "truncated", "no answer")


def summarise_lengths(lengths: ArrayLike, stopped: ArrayLike, samples: int) -> Row:
    """Response length (tokens) with its error over problems, truncation and end-of-sequence rates.

    Rows are ``samples`` neighbours for each problem.
    """
    lengths, stopped = np.asarray(lengths, np.float64), np.asarray(stopped, bool)
    length = summarise(lengths.reshape(-1, samples).mean(axis=1))
    return {
        "problems": length.problems,
        "samples": samples,
        "response_length": length.mean,
        "response_length_se": length.error,
        "response_length_median": float(np.median(lengths)),
        "truncation_rate": float(np.mean(~stopped)),
        "eos_rate": float(np.mean(stopped)),
    }


def summarise_verdicts(verdicts: Sequence[Verdict], samples: int) -> Row:
    """Accuracy avg@k with its error and 95 % interval, pass@k and maj@k for powers of two (and all samples), and where
    the answers were found. Rows are ``samples`` neighbours for each problem."""
    correct = np.array([v.correct for v in verdicts]).reshape(-1, samples)
    votes = [None if v.answer is None else normalise(v.answer) for v in verdicts]
    answers = [votes[i : i + samples] for i in range(0, len(votes), samples)]
    score = avg_at_k(correct)
    row: Row = {"accuracy": score.mean, "accuracy_se": score.error, "accuracy_interval": [score.low, score.high]}
    row |= {name: sum(v.found == found for v in verdicts) / len(verdicts) for found, name in FOUND_RATES.items()}
    if samples > 1:
        ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
        row["pass_at_k"] = {str(k): as_row(pass_at_k(correct, k)) for k in ks}
        row["maj_at_k"] = {str(k): as_row(maj_at_k(correct, answers, k)) for k in ks}
    return row


def as_row(score: Score) -> Row:
    """``{"mean", "error", "low", "high"}``."""
    row = dataclasses.asdict(score)
    del row["problems"]
    return row


def table_rows(benchmarks: Mapping[str, Row]) -> list[list[Any]]:
    """A row of ``COLUMNS`` for each benchmark of a result."""
    rows = []
    for name, row in benchmarks.items():
        best, majority = (row.get(of, {}).get(str(row["samples"])) for of in ("pass_at_k", "maj_at_k"))
        low, high = row["accuracy_interval"]
        rows.append(
            [
                name,
                row["problems"],
                (row["accuracy"], row["accuracy_se"]),
                f"{low:.3f} – {high:.3f}",
                best and best["mean"],
                majority and majority["mean"],
                row["response_length"],
                row["truncation_rate"],
                row["no_answer_rate"],
            ]
        )
    return rows


def columns(samples: int) -> list[str]:
    """``COLUMNS`` with k in numbers."""
    return [name.replace("@k", f"@{samples}") for name in COLUMNS]


def markdown(result: Row) -> str:
    """A result as tables: one row for each benchmark, then one for each problem."""
    settings = result["settings"]
    samples = settings["samples"]
    law = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    lines = [
        f"# {settings['model']}",
        "",
        f"{law}, at most {settings['max_response']:,} tokens, seed {settings['seed']}.",
    ]
    lines += [
        "Errors and intervals are over problems.",
        "",
        *markdown_table(columns(samples), table_rows(result["benchmarks"])),
    ]
    for name, row in result["benchmarks"].items():
        facts = f"{row['source']}; {row['problems']:,} problems, sha256 {row['sha256'][:16]}…"
        heads = ["id", "gold", f"right of {samples}", "mean length", "truncated", "no answer"]
        lines += [
            "",
            f"## {name}",
            "",
            facts,
            "",
            *markdown_table(heads, [list(p.values()) for p in row["per_problem"]]),
        ]
    return "\n".join(lines) + "\n"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table; cells as ``console.table`` takes them."""
    cells = [[format_value(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]
