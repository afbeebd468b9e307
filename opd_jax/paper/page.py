"""What the suite found, as a page in Markdown with figures: the table of claims, every check, the curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opd_jax.errors import InputError
from opd_jax.paper.claims import CLAIMS, HOLDS, Check, Claim, interval, verdict
from opd_jax.paper.figures import CURVES, FURTHER, MORE_CURVES, curves
from opd_jax.paper.presets import DOMAINS
from opd_jax.tracking.plots import save

Row = dict[str, Any]
Found = dict[tuple[str, str], list[Row]]  # (domain, experiment) → rows, one a seed
Judged = list[tuple[Claim, str, list[Check]]]  # with the domain that the checks were made on

MAIN, *OTHERS = DOMAINS  # on the first, all claims are examined
# What the names of an experiment's runs and rows mean, where they do not tell.
NOTES = {
    "4.2": "raw: not renormalised over the support; clipped: all gradients have the same norm.",
    "6.1": "A run's name is its longest response, in tokens.",
    "6.2": "Coherence over that of orthogonal gradients is 1 where token gradients of these norms are orthogonal.",
    "6.3": "topk is Eq. 5, topk_reference the published code's objective.",
}


def by_experiment(rows: Sequence[Row]) -> Found:
    found: Found = {}
    for row in rows:
        found.setdefault((row["domain"], row["experiment"]), []).append(row)
    return found


def judged(rows: Sequence[Row]) -> Judged:
    """Claims with the domain they were examined on, and their checks."""
    found = by_experiment(rows)
    return [
        (claim, domain, claim.checks(counted))
        for claim in CLAIMS
        for (domain, experiment), of in found.items()
        if experiment == claim.experiment and (counted := [row for row in of if row["seed"] >= claim.since])
    ]


def table_rows(judged: Judged) -> list[list[Any]]:
    """Claim, section, domain, verdict, checks that hold, seeds."""
    return [
        [
            claim.number,
            claim.experiment,
            claim.text,
            domain,
            verdict(checks),
            f"{sum(check.verdict == 'holds' for check in checks)} of {len(checks)}",
            len(checks[0].values),
        ]
        for claim, domain, checks in judged
    ]


def read_reasons(results: Path) -> dict[str, str]:
    """Why a claim may not hold, by its number, or what else there is to say of it; ``5 products`` for a domain beside
    the first; what all of them come to, as ``summary``. From ``reasons.yaml`` beside the results, if there.

    Raises:
        InputError: not a text for each of some claims.
    """
    path, numbers = results / "reasons.yaml", [claim.number for claim in CLAIMS]
    known = ["summary", *numbers, *(f"{number} {domain}" for number in numbers for domain in OTHERS)]
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as e:
        raise InputError(f"{path}: cannot be read as YAML ({e}). Mend or remove it.") from e
    if not isinstance(found, dict) or not all(k in known and isinstance(v, str) for k, v in found.items()):
        raise InputError(
            f'{path}: expected a text by the number of a claim, as "10": …; known: summary, {", ".join(numbers)}; '
            f'"10 {OTHERS[0]}" for another domain'
        )
    return found


COST = ("rollout", "score", "update")
HEADS = ("claim", "section", "what it says", "domain", "verdict", "checks that hold", "seeds")


def write_page(rows: Sequence[Row], judged: Judged, page: Path, figures: Path, command: str) -> None:
    """Writes ``page`` and the PNGs it shows, which lie in ``figures``."""
    found, reasons = by_experiment(rows), read_reasons(figures)
    trained = {key: seconds for row in rows for key, seconds in row["cpu_seconds"].items()}
    checks = sum(len(checks) for *_, checks in judged)
    lines = [
        "# The paper in miniature",
        "",
        f"Written by `{command}` from the results in `{figures.name}/`; only summary and reasons are typed by hand. "
        "On folds (products of group elements, worked out in one of several orders) and on products (of numbers, "
        "modulo a prime). A claim holds if every interval lies where it is expected, does not if one lies wholly "
        "outside, else is undecided. Models, experiments and where they depart from the paper: docs/miniature.md of "
        "opd_jax.",
        "",
        *([summary.strip(), ""] if (summary := reasons.get("summary")) else []),
        _markdown(HEADS, table_rows(judged)),
        "",
        f"{checks} checks, each with Student's interval of 95 % over the seeds; experiments share runs, so that checks "
        f"are not independent. {len(trained)} training runs: {sum(trained.values()) / 3600:.1f} CPU hours, of an "
        "interrupted run only what came after.",
        *_not_reproduced(judged, reasons),
        "",
        "## Models",
        "",
        "Accuracies on held-out problems. *compatible* is *rewarded*, and *mismatched* is *other*, of more seeds.",
        "",
        _models(rows),
    ]
    shown = set()
    for claim, domain, checks in judged:
        lines += _judgement(claim, domain, checks, reasons)
        if (key := (domain, claim.experiment)) not in shown:
            shown.add(key)
            lines += _measured(claim, domain, found[key], figures)
    page.write_text("\n".join(lines) + "\n")


def _judgement(claim: Claim, domain: str, checks: Sequence[Check], reasons: Mapping[str, str]) -> list[str]:
    lines = ["", f"## Claim {claim.number} (§{claim.experiment}) on {domain}: {verdict(checks)}", "", claim.text, ""]
    if claim.since:
        lines += [f"Seeds from {claim.since} on count: the others had been seen when it was written.", ""]
    lines += [_markdown(("effect", "mean", "95 %", "expected", "verdict"), [_cells(check) for check in checks])]
    if verdict(checks) == HOLDS and (remark := _reason(claim, domain, reasons)):
        lines += ["", f"Remark: {remark}"]
    return lines


def _measured(claim: Claim, domain: str, rows: Sequence[Row], figures: Path) -> list[str]:
    """Runs, figures and what else an experiment has."""
    drawn = {}
    if rows[0]["runs"]:
        drawn[""] = curves(rows, CURVES | MORE_CURVES.get(claim.experiment, {}))
    if draw := FURTHER.get(claim.experiment):
        drawn["-further"] = draw(rows)
    lines = ["", _runs(rows)] if rows[0]["runs"] else []
    if note := NOTES.get(claim.experiment):
        lines += ["", note]
    for suffix, figure in drawn.items():
        name = f"{domain}-{claim.experiment}{suffix}.png"
        save(figure, figures / name)
        lines += ["", f"![{claim.text}]({figures.name}/{name})"]
    return lines + MORE.get(claim.experiment, lambda rows: [])(rows)


def _reason(claim: Claim, domain: str, reasons: Mapping[str, str]) -> str:
    return reasons.get(claim.number if domain == MAIN else f"{claim.number} {domain}", "").strip()


def _not_reproduced(judged: Judged, reasons: Mapping[str, str]) -> list[str]:
    """The claims that do not hold or are undecided, by which checks, and why that may be."""
    lines = []
    for claim, domain, checks in judged:
        if verdict(checks) != HOLDS:
            told = "; ".join(
                f"{check.text}: {check.mean:+.3f}, expected {check.expected} ({check.verdict})"
                for check in checks
                if check.verdict != HOLDS
            )
            title = f"**Claim {claim.number}** (§{claim.experiment}) on {domain}, {verdict(checks)}"
            lines.append(f"- {title}: {told}. {_reason(claim, domain, reasons)}".rstrip())
    told = "Written after the results; where no further experiment is named, a reason is a guess."
    return ["", "## What did not reproduce, and why that may be", "", told, "", *lines] if lines else []


def _models(rows: Sequence[Row]) -> str:
    """Accuracies of all models on the problems of the main task."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        for name, model in row["models"].items():
            found.setdefault((row["domain"], name), {})[row["seed"]] = model["accuracy"]
    return _markdown(
        ("domain", "model", "accuracy", "95 %"),
        [[domain, name, *_told(list(of.values()))] for (domain, name), of in found.items()],
    )


def _runs(rows: Sequence[Row]) -> str:
    def cells(name: str) -> list[Any]:
        runs = [row["runs"][name] for row in rows]
        first, last = ([run["evaluations"]["accuracy"][at] for run in runs] for at in (0, -1))
        teachers = [run["teacher_accuracy"] for run in runs]
        overlap = [
            f"{np.mean([run['evaluations']['overlap_ratio'][at] for run in runs]):.3f}"
            for at in (0, -1)
            if "overlap_ratio" in runs[0]["evaluations"]
        ]
        cost = [
            f"{1000 * np.median([run['cost'][f'time/{part}'] for run in runs]):.0f}"
            if f"time/{part}" in runs[0]["cost"]
            else "–"
            for part in COST
        ]
        teacher = "–" if None in teachers else _told(teachers)[0]
        return [name, _told(first)[0], *_told(last), teacher, " → ".join(overlap) or "–", *cost]

    heads = ("run", "accuracy before", "after", "95 %", "teacher", "overlap", *(f"{part}, ms a step" for part in COST))
    return _markdown(heads, [cells(name) for name in rows[0]["runs"]])


def _clipped(rows: Sequence[Row]) -> list[str]:
    shares = [row["share_of_steps_clipped"] for row in rows]
    told = ", ".join(f"{name} {_told([share[name] for share in shares])[0]}" for name in shares[0])
    return ["", f"Share of the steps whose gradient was longer than the norm it was clipped to: {told}."]


def _depths(rows: Sequence[Row]) -> list[str]:
    cuts = zip(*(row["depth"]["depths"] for row in rows), strict=True)
    heads = ("cut after (tokens)", "accuracy of the teacher's continuation − the student's", "95 %")
    return ["", _markdown(heads, [[of[0]["depth"], *_told([cut["difference"]["value"] for cut in of])] for of in cuts])]


def _aurocs(rows: Sequence[Row]) -> list[str]:
    """Both are measured on the same rollouts."""
    measured = {
        "AUROC of the mean reward": lambda row, name: row["reward"][name]["auroc"]["value"],
        "coherence": lambda row, name: row["coherence"][name],
        "over that of orthogonal gradients": lambda row, name: row["ratio"][name],
    }
    heads = ["teacher", *(head for name in measured for head in (name, "95 %"))]
    lines = [
        [name, *(cell for of in measured.values() for cell in _told([of(row, name) for row in rows]))]
        for name in rows[0]["reward"]
    ]
    return ["", _markdown(heads, lines)]


def _gradients(rows: Sequence[Row]) -> list[str]:
    """Bias and noise of the objectives beside the full KL's gradient."""

    def cell(at: int, kind: str) -> str:
        values = [row["gradients"][at][kind] for row in rows]
        return "–" if None in values else _told(values)[0]

    lines = [[of["name"], cell(i, "bias"), cell(i, "noise")] for i, of in enumerate(rows[0]["gradients"])]
    problems = _told([row["noise_of_problems"] for row in rows])[0]
    return [
        "",
        "At the start, summed over the tokens looked at, as a share of the norm of the full KL's gradient: how far the "
        "gradient is from it in expectation (bias), and how much drawing one token scatters it (noise). "
        f"Drawing the problems scatters all of them by {problems}.",
        "",
        _markdown(("objective", "bias", "noise"), lines),
    ]


MORE: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "4.2": _clipped,
    "6.1": _depths,
    "6.2": _aurocs,
    "6.3": _gradients,
}


def _told(values: Sequence[float]) -> list[str]:
    mean, low, high = interval(values)
    return [f"{mean:.3f}", _bounds(low, high, "")]


def _bounds(low: float, high: float, sign: str) -> str:
    return f"{low:{sign}.3f} … {high:{sign}.3f}" if math.isfinite(low + high) else "–"  # of a single seed


def _cells(check: Check) -> list[Any]:
    return [check.text, f"{check.mean:+.3f}", _bounds(check.low, check.high, "+"), check.expected, check.verdict]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
