"""What ``opd analyze gradients`` says: do tokens agree, which teacher's cancel, and what each objective misses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.analysis import figures
from opd_jax.analysis.estimates import cells, told
from opd_jax.analysis.gradients import KIND
from opd_jax.analysis.token_gradients import DRAWS, FULL
from opd_jax.tracking.labels import format_value
from opd_jax.tracking.sections import Plot, Section, Table

Row = dict[str, Any]

TITLES = {
    "all": "all tokens", "right": "right rollouts", "wrong": "wrong rollouts", "overlap": "token in S_p ∩ S_q",
    "student only": "token in S_p \\ S_q", "outside": "token outside S_p", "sequences": "sums of rollouts",
}  # fmt: skip


def section(result: Row) -> Section:
    """What people see of a result."""
    teachers = [t for t in result["teachers"] if t["defined"]]
    tables: list[Table] = []
    for t in teachers:
        tables += [
            Table(
                f"{t['name']}: coherence ‖Σg‖ / Σ‖g‖ of the full KL's gradients",
                ["of", "terms", "coherence", "95 %", "if orthogonal", "ratio", "95 %", "mean ‖g‖"],
                [_coherence_row(t, name) for name in t["coherence"]],
            ),
            Table(
                f"{t['name']}: by position",
                ["tokens", "of tokens", "mean ‖g‖", "coherence", "95 %", "if orthogonal", "ratio", "95 %"],
                [_depth_row(row) for row in t["by_depth"]],
            ),
            Table(
                f"{t['name']}: cosines", ["of", "pairs", "mean", "95 %"],
                [
                    [f"{kind}, {name}", row["pairs"], *cells(row["mean"])]
                    for kind, of in t["cosines"].items()
                    for name, row in of["groups"].items()
                ],
            ),
            Table(
                f"{t['name']}: each objective against the full KL, relative to its gradient",
                ["objective", "bias, token", "rollout", "batch", "95 %", "cosine, batch", "noise, token", "batch",
                 "coherence"],
                [_variant_row(row) for row in t["variants"]],
            ),
        ]  # fmt: skip
    return Section(KIND, f"Gradients of {_student(result)}'s tokens", _lead(result), tables, _plots(teachers))


def _coherence_row(t: Row, name: str) -> list[Any]:
    held, norms = t["coherence"][name], t["norms"].get(name)
    norm = norms and norms["mean"]["value"]
    if held is None:
        return [TITLES[name], norms["tokens"] if norms else 0, None, None, None, None, None, norm]
    return [
        TITLES[name], held["terms"], *cells(held["coherence"]), held["orthogonal"]["value"], *cells(held["ratio"]), norm
    ]  # fmt: skip


def _depth_row(row: Row) -> list[Any]:
    norm, held = row["norm"] and (row["norm"]["value"], row["norm"]["error"]), row["coherence"]
    head = [f"{row['start']:,} – {row['end'] - 1:,}", row["tokens"], norm]
    if held is None:
        return [*head, None, None, None, None, None]
    return [*head, *cells(held["coherence"]), held["orthogonal"]["value"], *cells(held["ratio"])]


def _variant_row(row: Row) -> list[Any]:
    coherence = row["coherence"] and row["coherence"]["value"]
    bias, noise = row["bias"], row["noise"]
    if noise:
        return [row["name"], 0, 0, 0, None, None, noise["token"]["value"], noise["batch"]["value"], coherence]
    cosine = 1 if row["name"] == FULL else row["cosine"] and row["cosine"]["value"]
    of = [bias[name]["value"] for name in ("token", "sequence")]
    return [row["name"], *of, *cells(bias["batch"]), cosine, 0, 0, coherence]


def _plots(teachers: Sequence[Row]) -> list[Plot]:
    if not teachers:
        return []
    depth = {t["name"]: [row for row in t["by_depth"] if row["coherence"]] for t in teachers}

    def curves(*path: str) -> Row:
        def of(row: Row) -> Row:
            for name in path:
                row = row[name]
            return row

        return {
            name: [
                {k: r[k] for k in ("start", "end")} | {"mean": of(r)["value"], "error": of(r)["error"]} for r in rows
            ]
            for name, rows in depth.items()
        }

    labels = {
        ("coherence", "coherence"): "coherence ‖Σg‖ / Σ‖g‖",
        ("coherence", "ratio"): "coherence / that of orthogonal gradients",
        ("norm",): "mean ‖g‖ of a token",
    }
    plots = [
        Plot(f"{label} by output position", lambda p=path, y=label: figures.by_depth(curves(*p), y))
        for path, label in labels.items()
    ]
    for t in teachers:
        for kind, what in (("tokens", "two tokens"), ("sequences", "two rollouts")):
            of = t["cosines"][kind]
            counts = {name: row["histogram"] for name, row in of["groups"].items()}
            label = f"cosine of the gradients of {what}"
            plots.append(
                Plot(
                    f"{t['name']}: histogram of the {label}",
                    lambda c=counts, e=of["edges"], y=label, n=t["name"]: figures.histogram(c, e, y, n),
                )
            )
    norms = [(t["name"], t["histogram"]) for t in teachers]
    plots += [
        Plot(
            f"{name}: histogram of the gradient norms of tokens",
            lambda h=held, n=name: figures.histogram({"tokens": h["counts"]}, h["edges"], "log₁₀ ‖g‖ of a token", n),
        )
        for name, held in norms
    ]
    return plots


def _lead(result: Row) -> list[str]:
    lines = [
        f"{result['problems']:,} problems of {result['source']} × {result['samples']} rollouts of {_student(result)}: "
        f"{result['tokens']:,} of {result['of_tokens']:,} tokens, over all rollouts, the same for every teacher. "
        "g is the gradient of the full KL at a token in all parameters of the student."
    ]
    for t in result["teachers"]:
        if not t["defined"]:
            lines.append(
                f"{t['name']}: it says the same as the student (mean norm of a gradient in the logits "
                f"{format_value(t['logit_norm'])}): its gradients are 0 and have no direction. Coherence is undefined."
            )
            continue
        whole, batch = t["coherence"]["all"], t["batch"]
        noise = "" if batch["noise"] is None else f", noise of the problems drawn {batch['noise']:.0%} of that"
        lines.append(
            f"{t['name']}: coherence {told(whole['coherence'])}, where orthogonal gradients of these norms have "
            f"{format_value(whole['orthogonal']['value'])}: {meaning(whole['ratio'])}. Norm of the mean gradient "
            f"{format_value(batch['norm']['value'])}{noise}."
            if whole
            else f"{t['name']}: fewer than two tokens have a gradient; coherence is undefined."
        )
    defined = [t for t in result["teachers"] if t["defined"]]
    lines += [_compared(t, defined[0]["name"]) for t in defined if "difference" in t]
    if defined:
        directions = defined[0]["directions"]
        how = (
            "Gradients are exact."
            if directions is None
            else f"Gradients are projected on {directions:,} random directions: a norm has a relative error of about "
            f"{(2 * directions) ** -0.5:.1%}, a cosine of {directions**-0.5:.2f}."
        )
        lines.append(
            f"{how} Intervals resample problems. Biases are of expected gradients; that of sampled is 0, and its noise "
            f"is measured by {DRAWS} fresh tokens at each state. Objectives without noise have the same gradient "
            "whatever token is drawn at a state."
        )
        lines.append(
            "Whether a teacher fails because its gradients cancel is not known (paper §6.2 leaves it untested): a "
            "lower coherence agrees with that, and does not prove it."
        )
    return lines


def meaning(ratio: Row) -> str:
    """What ‖Σ g‖ / √Σ‖g‖² and its interval say; one that holds 1 does not show that gradients are orthogonal."""
    low, high = ratio["low"], ratio["high"]
    text = f"{format_value(ratio['value'])} times as much"
    if low is None or high is None:
        return text
    bounds = f" (95 % interval {low:.2f} … {high:.2f})"
    if low > 1:
        return text + bounds + ", so they agree more than at random"
    return text + bounds + (", so they cancel in part" if high < 1 else ", not told apart from random directions")


def _compared(t: Row, first: str) -> str:
    held, ratio = t["difference"]["coherence"], t["difference"]["ratio"]
    words = {
        "lower": f"its gradients are less coherent than those of {first}",
        "higher": f"its gradients are more coherent than those of {first}",
        "undecided": f"undecided whether its gradients are more or less coherent than those of {first}",
    }
    return (
        f"{t['name']}: {words[_verdict(held)]}, difference {told(held)}. Relative to orthogonal gradients: "
        f"{_verdict(ratio)}, difference {told(ratio)}."
    )


def _verdict(held: Row) -> str:
    low, high = held["low"], held["high"]
    if low is None or high is None or low <= 0 <= high:
        return "undecided"
    return "higher" if low > 0 else "lower"


def _student(result: Row) -> str:
    return Path(result["student"]).name
