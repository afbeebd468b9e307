"""What ``opd diagnose`` says: which conditions hold, by which numbers, how sure that is, and what to do if not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax.analysis import figures
from opd_jax.analysis.diagnose import COMPATIBLE, DOUBT, FAILS, HOLDS, KIND, LONG, THRESHOLDS, UNKNOWN
from opd_jax.analysis.estimates import cells, told
from opd_jax.tracking.labels import axis_label, format_duration, format_value, short_label
from opd_jax.tracking.sections import Plot, Section, Table

Row = dict[str, Any]

EASY = 0.9  # accuracy of the student from which there is little left to learn
METRICS = (
    "overlap_ratio",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_advantage",
    "entropy_gap",
    "reverse_kl",
    "forward_kl",
)
BY_DEPTH = ("overlap_ratio", "overlap_mass_student", "overlap_advantage", "entropy_gap", "reverse_kl", "forward_kl")


def section(result: Row) -> Section:
    """What people see of a result."""
    teachers = [next(t for t in result["teachers"] if t["name"] == name) for name in result["ranking"]]
    names = [t["name"] for t in teachers]
    fit = [
        ["compatible patterns", *(t["compatible"]["verdict"] for t in teachers)],
        ["new knowledge", *(t["new_knowledge"] for t in teachers)],
        *([_short(name, result["k"]), *(_pair(t["metrics"][name]) for t in teachers)] for name in METRICS),
    ]
    tables = [
        Table("fit, the best teacher first", ["", *names], fit),
        Table("accuracy", *_accuracy_rows(result, teachers)),
        Table(
            "mean reward: right against wrong rollouts of the student",
            ["teacher", "AUROC", "95 %", "within a problem", "95 %"],
            [_reward_row(t) for t in teachers],
        ),
        *_update_tables(teachers),
        Table("before any number: do they agree?", *_setting_rows(result, teachers)),
        *(
            Table(
                f"{t['name']} by position",
                ["tokens", "of tokens", *(_short(name, result["k"]) for name in BY_DEPTH)],
                _depth_rows(t["by_depth"]),
            )
            for t in teachers
        ),
        Table(
            "conditions",
            ["metric", "holds from", "fails below", "source"],
            [[_short(name, result["k"]), t.holds, t.fails, t.source] for name, t in THRESHOLDS.items()],
        ),
    ]
    plots = [_plot(name, teachers, result["k"]) for name in BY_DEPTH]
    return Section(
        KIND, f"Does it fit? {_student(result)} ← {', '.join(names)}", _lead(result, teachers), tables, plots
    )


def _plot(name: str, teachers: Sequence[Row], k: int) -> Plot:
    label, curves = axis_label(name, k), {t["name"]: t["by_depth"][name] for t in teachers}
    return Plot(f"{label} of each teacher by output position", lambda: figures.by_depth(curves, label))


def _accuracy_rows(result: Row, teachers: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    heads = ["model", "accuracy", "gain", "95 %", "it alone", "student alone", "length", "truncated"]

    def of(name: str, rollouts: Row, known: Row | None) -> list[Any]:
        return [
            name,
            (rollouts["accuracy"], rollouts["accuracy_se"]),
            *cells(known and known["accuracy_gain"]),
            *(known and known[n]["value"] for n in ("new", "lost")),
            rollouts["response_length"],
            rollouts["truncation_rate"],
        ]

    rows = [of(t["name"], t["of_teacher"], t["knowledge"]) for t in teachers]
    return heads, [of(f"{_student(result)} (student)", result["of_student"], None), *rows]


def _reward_row(t: Row) -> list[Any]:
    of = t["reward"] or {}
    return [t["name"], *cells(of.get("auroc")), *cells(of.get("auroc_within"))]


def _first_update(t: Row) -> str:
    of, step = t["first_update"], t["step"]
    agree = of["coherence"]
    text = f"the first update has a gradient of norm {told(of['norm'])}"
    if agree:
        text += (
            f" and coherence {told(agree['coherence'])}, {format_value(agree['orthogonal']['value'])} if orthogonal, "
            f"on {of['rollouts']} rollouts"
        )
    gib = sum(step["bytes"].values()) / 2**30
    return (
        f"{text}. A step of 64 × 4 such rollouts takes about {sum(step['flops'].values()) / 1e12:,.3g} TFLOP, "
        f"{format_duration(sum(step['seconds'].values()))} on this machine, and {gib:,.3g} GiB "
        "beside activations."
    )


def _update_tables(teachers: Sequence[Row]) -> list[Table]:
    """The first update, and a step of 64 prompts × 4 rollouts on this machine."""
    held = [t for t in teachers if t["first_update"]]
    if not held:
        return []
    updates, costs = [], []
    for t in held:
        of, step = t["first_update"], t["step"]
        said = of["coherence"] or dict.fromkeys(("coherence", "orthogonal", "ratio"))
        agree = [*cells(said["coherence"]), cells(said["orthogonal"])[0], *cells(said["ratio"])]
        updates.append([t["name"], of["rollouts"], of["tokens"], *cells(of["norm"]), *agree])
        for name in step["seconds"]:
            numbers = step["flops"][name] / 1e12, step["rates"][name], step["seconds"][name]
            costs.append([f"{t['name']}: {name}", *numbers])
    heads = ["teacher", "rollouts", "tokens", "gradient norm", "95 %"]
    heads += ["coherence", "95 %", "if orthogonal", "ratio", "95 %"]
    columns = ["", *(t["name"] for t in held)]
    memory = [[name, *(t["step"]["bytes"][name] / 2**20 for t in held)] for name in held[0]["step"]["bytes"]]
    memory.append(["together", *(sum(t["step"]["bytes"].values()) / 2**20 for t in held)])
    stages = ["stage", "TFLOP", "tokens/s here", "seconds here"]
    return [
        Table("first update: gradients of the full KL, one rollout of each problem", heads, updates),
        Table("memory of a training step without activations, MiB", columns, memory),
        Table("a training step of 64 × 4 rollouts of these lengths", stages, costs),
    ]


def _setting_rows(result: Row, teachers: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)

    first = teachers[0]["settings"]
    rows: list[list[Any]] = [["tokens of the tokenizer", first["tokens"], *("the same" for _ in teachers)]]
    rows.append(["output ids", first["outputs"][0], *(t["settings"]["outputs"][1] for t in teachers)])
    for name in ("bos", "eos", "pad"):
        both = [t["settings"]["special"][name] for t in teachers]
        rows.append([f"{name} id", text(both[0][0]), *(text(b[1]) for b in both)])
    rows.append(
        ["ids that end a response", text(first["stops"][0]), *(text(t["settings"]["stops"][1]) for t in teachers)]
    )
    differ = [t["settings"]["prompts_differ"] for t in teachers]
    rows.append(["prompts rendered otherwise", None, *(f"{n} of {result['problems']}" for n in differ)])
    rows.append(["scored twice: equal", None, *(t["scoring"]["repeats"] for t in teachers)])
    rows.append(["packed or not: largest difference (nats)", None, *(t["scoring"]["packing"] for t in teachers)])
    return ["", _student(result), *(t["name"] for t in teachers)], rows


def _depth_rows(of: Row) -> list[list[Any]]:
    return [
        [f"{r['start']:,} – {r['end'] - 1:,}", r["tokens"], *(_pair(of[name][i]) for name in BY_DEPTH)]
        for i, r in enumerate(of[BY_DEPTH[0]])
    ]


def _lead(result: Row, teachers: Sequence[Row]) -> list[str]:
    lines = [
        f"{result['problems']:,} problems of {result['source']} × {result['samples']} rollouts of {_student(result)}, "
        f"at most {result['max_response']:,} tokens. Two conditions of success: student and teacher think in "
        "compatible patterns, and the teacher knows what the student does not."
    ]
    for place, t in enumerate(teachers, 1):
        number = f"{place}. " if len(teachers) > 1 else ""
        lines.append(f"{number}{t['name']}: {_verdict(result, t)}")
        if t["first_update"]:
            lines.append(f"{t['name']}: {_first_update(t)}")
        lines += [f"{t['name']}: {what}" for what in _advice(result, t)]
    if len(teachers) > 1:
        lines.append("Ranked by the conditions that hold, then by accuracy gained × overlap, then by overlap.")
    lines.append(
        "How sure: a condition holds or fails only where its whole 95 % interval, over problems, lies beyond the "
        "threshold; else it is in doubt. The thresholds come from single runs (see the table), so a condition that "
        "holds makes success likely, not certain: in the paper a larger model of the student's own training, R1-7B, "
        "taught it little (§4.1), and the AUROC was as high for it as for the teacher that succeeded (§6.2)."
    )
    return lines


def _verdict(result: Row, t: Row) -> str:
    numbers = t["metrics"]
    if t["same"]:
        overlap, gap, kl = (
            format_value(numbers[name]["mean"]) for name in ("overlap_ratio", "entropy_gap", "reverse_kl")
        )
        return (
            f"it says the same as the student: overlap {overlap}, entropy gap {gap} nats, reverse KL {kl} nats per "
            "token. There is nothing to learn."
        )
    shown = "; ".join(
        f"{_short(name, result['k'])} {format_value(_pair(numbers[name]))}, {t['compatible'][name]}, "
        f"from {THRESHOLDS[name].holds:g}"
        for name in COMPATIBLE
        if name in t["compatible"]
    )
    text = f"compatible patterns: {t['compatible']['verdict']} ({shown}). New knowledge: {t['new_knowledge']}"
    if t["knowledge"] is None:
        return f"{text} (the problems have no answers)."
    known = t["knowledge"]
    theirs, mine = (format_value(of["accuracy"]) for of in (t["of_teacher"], result["of_student"]))
    return (
        f"{text} (accuracy {theirs} against {mine}, gain {told(known['accuracy_gain'])}; of the problems it alone ever "
        f"solves {known['new']['value']:.0%}, the student alone {known['lost']['value']:.0%}, in {result['samples']} "
        "samples each)."
    )


def _advice(result: Row, t: Row) -> list[str]:
    found = []
    if not t["scoring"]["repeats"]:
        found.append("scoring the same rows twice gave two results: look for a device or library at fault first.")
    if t["scoring"]["packing"] > t["scoring"]["rounding"]:
        found.append(
            f"packing changes a log-probability by {format_value(t['scoring']['packing'])} nats, more than rounding "
            f"({t['scoring']['rounding']:g}): compare with --dtype float32, and do not train with pack: true."
        )
    if t["settings"]["prompts_differ"]:
        found.append(
            f"its tokenizer renders {t['settings']['prompts_differ']} of {result['problems']} prompts otherwise, but "
            "it scores the student's. If it was trained with another template, set data.template and "
            "data.chat_arguments to that (§5.2)."
        )
    if t["same"]:
        return found
    if t["compatible"]["verdict"] != HOLDS:
        found.append(
            "patterns: begin with a cold start, the student fine-tuned on this teacher's rollouts (opd generate, opd "
            "data filter, kind: sft; §5.1), or take prompts and template of the teacher's own training, mixed with "
            "others (§5.2)."
        )
    if t["new_knowledge"] in (FAILS, DOUBT):
        if (result["of_student"]["accuracy"] or 0) > EASY:
            found.append("knowledge: the student solves these problems already; take harder ones.")
        else:
            found.append(
                "knowledge: take problems on which the teacher is better (more of them, if in doubt), or a teacher "
                "trained further by reinforcement learning (§3.2); a student of one that is no better regresses (§3.3)."
            )
    if t["new_knowledge"] == UNKNOWN:
        found.append(
            "knowledge: give problems with answers (data.answer=COLUMN)."
            if t["knowledge"] is None
            else "knowledge: no problem tells the two apart; give others, a larger --max-response, or --last-number."
        )
    if fades := t["fades"]:
        found.append(
            f"from {fades['from']:,} tokens on the overlap is lower than at the start by "
            f"{format_value((fades['drop'], fades['error']))}: a shorter horizon (rollout.max_response or "
            "positions.horizon) trains where the teacher still follows (§6.1)."
        )
    reward = t["reward"]
    if reward and reward["auroc"]["high"] is not None and reward["auroc"]["high"] < 0.5:
        found.append(f"it prefers wrong rollouts to right ones: AUROC of its mean reward {told(reward['auroc'])}.")
    if result["of_student"]["truncation_rate"] > LONG:
        found.append(
            f"{result['of_student']['truncation_rate']:.0%} of the student's rollouts were cut at "
            f"{result['max_response']:,} tokens; with a larger --max-response their ends are seen, too."
        )
    return found


def _pair(held: Row) -> tuple[float, float]:
    return held["mean"], held["error"]


def _short(name: str, k: int) -> str:
    return f"overlap@{k}" if name == "overlap_ratio" else short_label(name)


def _student(result: Row) -> str:
    return Path(result["student"]).name
