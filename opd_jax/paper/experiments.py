"""The paper's experiments on self-made models: each a function from a ``Lab`` to what was measured.

An experiment's row is valid JSON: ``models`` with their accuracies, ``runs`` as ``Run.row`` gives them, and what else
it measured. What the numbers mean is decided in ``claims``. Runs that several experiments share are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opd_jax.analysis.depth import analyse_depth
from opd_jax.analysis.gradients import analyse_gradients
from opd_jax.analysis.pair import Sampling
from opd_jax.analysis.reward import analyse_reward
from opd_jax.config import Data
from opd_jax.paper.lab import Lab, Row, Run

# --- the models that experiments share ---

PRETRAIN_LR = 1.5e-3  # with twice of it, wider and deeper models did not learn the facts


def base(lab: Lab) -> Run:
    """The student: it imitates texts whose facts are shaky, so it does not know what none of them tells."""
    p = lab.preset
    return lab.sft("base", lab.random(p.width), lab.domain.corpus, p.pretrain, PRETRAIN_LR)


def large(lab: Lab) -> Run:
    """A larger model of the same pipeline: the same texts, hence the same knowledge."""
    p = lab.preset
    return lab.sft("large", lab.random(p.large_width, 1), lab.domain.corpus, p.large_pretrain, PRETRAIN_LR)


def rewarded(lab: Lab) -> Run:
    """The student's own base after GRPO: it thinks likewise, and has found out what no text told (paper A.1)."""
    p = lab.preset
    return lab.grpo("rewarded", base(lab).model, lab.domain.main, p.grpo, p.grpo_prompts)


def taught(lab: Lab) -> Run:
    """The student's own base after SFT on texts that tell the truth."""
    return lab.sft("taught", base(lab).model, lab.domain.main, lab.preset.pretrain // 4, 5e-4)


def other(lab: Lab) -> Run:
    """Knows all facts, and thinks otherwise: from scratch on texts of another pattern, then GRPO as ``rewarded``."""
    p, d = lab.preset, lab.domain
    imitating = lab.sft("other-base", lab.random(p.width, 2), d.variants["other"], p.pretrain, PRETRAIN_LR)
    return lab.grpo("other", imitating.model, d.main, p.grpo, p.grpo_prompts)


def cold_started(lab: Lab) -> Run:
    """The student after a few steps of SFT on responses of ``other`` (§5.1)."""
    data, key = lab.responses(other(lab).model, lab.preset.rows // 4)
    return lab.sft("cold", base(lab).model, data, lab.preset.cold, PRETRAIN_LR, made_from=key)


def succeeding(lab: Lab, **settings: Any) -> Run:
    """The main run: student ← its own base after GRPO."""
    return lab.opd("opd-rewarded", base(lab).model, rewarded(lab).model, settings)


def failing(lab: Lab, **settings: Any) -> Run:
    """Student ← larger model of the same pipeline."""
    return lab.opd("opd-large", base(lab).model, large(lab).model, settings)


def gradients(lab: Lab) -> Row:
    """Token gradients at the student's states, by teacher: coherence, and how each objective departs from full."""
    student, teachers = base(lab).model, [rewarded(lab).model, large(lab).model, other(lab).model]

    def measure() -> Row:
        rollouts = lab.preset.rollouts // 8  # the time goes with them
        looked_at = _looked_at(lab, rollouts=rollouts)
        paths = [model.path for model in teachers]
        return analyse_gradients(student.path, paths, *looked_at, tokens=4 * rollouts, dtype="float32")

    return lab.kept("gradients", [student, *teachers], measure)


# --- the experiments ---


def compatible_patterns(lab: Lab) -> Row:
    """3.1: two teachers, one of which thinks as the student does."""
    runs = {
        "compatible": succeeding(lab),
        "mismatched": lab.opd("opd-other", base(lab).model, other(lab).model),
    }
    return _row({"base": base(lab), "compatible": rewarded(lab), "mismatched": other(lab)}, runs)


def new_knowledge(lab: Lab) -> Row:
    """3.2: teachers that have learnt more since, by GRPO or from texts, and a larger one that has not."""
    runs = {
        "rewarded": succeeding(lab),
        "taught": lab.opd("opd-taught", base(lab).model, taught(lab).model),
        "large": failing(lab),
    }
    return _row({"base": base(lab), "rewarded": rewarded(lab), "taught": taught(lab), "large": large(lab)}, runs)


def reverse(lab: Lab, **objective: Any) -> Row:
    """3.3: the student after GRPO learns from itself before it, and from the larger model. Scores in the middle of the
    scale scatter most, and are compared here: twice as many problems, at half as many evaluations."""
    student, problems, every = rewarded(lab).model, 2 * lab.preset.problems, max(1, lab.preset.steps // 2)
    held_out = lab.held_out(lab.domain.main, problems)
    more: Row = {"evaluation": {"problems": problems, "data": held_out, "every": every}}
    more["objective"] = objective
    runs = {
        "base": lab.opd("reverse-base", student, base(lab).model, more),
        "large": lab.opd("reverse-large", student, large(lab).model, more),
    }
    return _row({"base": base(lab), "rewarded": rewarded(lab), "large": large(lab)}, runs)


def reverse_forward(lab: Lab) -> Row:
    """Further to 3.3: by the forward KL of the whole vocabulary. The reverse KL has next to no gradient where a student
    is certain, however much its teacher disagrees: ∂KL/∂z_v = p_v [log(p_v/q_v) − KL]."""
    return reverse(lab, name="full", divergence="forward")


def reverse_full(lab: Lab) -> Row:
    """Its control: the reverse KL of the whole vocabulary, so that to 3.3 the support alone differs, to 3.3+ the
    direction."""
    return reverse(lab, name="full")


def signs(lab: Lab) -> Row:
    """4.1: what is seen during a run that succeeds and one that fails."""
    runs = {"rewarded": succeeding(lab), "large": failing(lab)}
    return _row({"base": base(lab), "rewarded": rewarded(lab), "large": large(lab)}, runs)


def supports(lab: Lab) -> Row:
    """4.2: which tokens carry the gradient. ``raw`` is the published code's objective, but not renormalised over the
    support, as its ablation of non-overlapping tokens is; ``clipped`` has every gradient clipped to the same norm, far
    below all of them."""
    clip = 1e-3
    forms: dict[str, Row] = {
        "": {},
        " raw": {"objective": {"name": "topk_reference", "normalise": False}},
        " clipped": {"optimizer": {"clip": clip}},
    }
    runs = {}
    for support in ("student", "overlap", "non_overlap"):
        for form, settings in forms.items():
            objective = settings.get("objective", {}) | ({"support": support} if support != "student" else {})
            runs[support + form] = succeeding(lab, **settings | ({"objective": objective} if objective else {}))
    longer = {
        name: float(np.mean([step["gradient_norm"] > clip for step in run.steps]))
        for name, run in runs.items()
        if name.endswith("clipped")
    }
    return _row({"base": base(lab), "rewarded": rewarded(lab)}, runs) | {"share_of_steps_clipped": longer}


def supports_closed(lab: Lab) -> Row:
    """Further to 4.2: with one outcome for all tokens outside of the support, so that renormalising loses no mass."""
    runs = {
        support: succeeding(lab, objective={"support": support, "tail": True}) for support in ("student", "overlap")
    }
    runs["overlap alone"] = succeeding(lab, objective={"support": "overlap"})
    return _row({"base": base(lab), "rewarded": rewarded(lab)}, runs)


def cold_start(lab: Lab) -> Row:
    """5.1: SFT on a few responses of a teacher that thinks otherwise, before OPD from it."""
    runs = {
        "direct": lab.opd("opd-other", base(lab).model, other(lab).model),
        "cold start": lab.opd("opd-cold", cold_started(lab).model, other(lab).model),
    }
    return _row({"base": base(lab), "cold": cold_started(lab), "other": other(lab)}, runs)


def prompts(lab: Lab) -> Row:
    """5.2: prompts in the teacher's template or without, which is answered by another pattern; of the content that the
    teacher was made on, of narrower content, or both."""
    runs = {
        "aligned": succeeding(lab),
        "without template": succeeding(lab, data=lab.domain.variants["bare"]),
        "other content": succeeding(lab, data=lab.domain.variants["rotations"]),
        "mixed content": succeeding(lab, data=_mixed(lab)),
    }
    return _row({"base": base(lab), "rewarded": rewarded(lab)}, runs)


def prompts_tenth(lab: Lab) -> Row:
    """Further to 5.2: a mixture with so little of the teacher's content that there is entropy left to keep."""
    runs = {
        "aligned": succeeding(lab),
        "mixed content": succeeding(lab, data=_mixed(lab)),
        "a tenth": succeeding(lab, data=_mixed(lab, weight=9.0)),
        "other content": succeeding(lab, data=lab.domain.variants["rotations"]),
    }
    return _row({"base": base(lab), "rewarded": rewarded(lab)}, runs)


def _mixed(lab: Lab, **other: float) -> Row:
    """Prompts of the teacher's content and of narrower content; ``other``: settings of the latter."""
    parts = {"main": lab.domain.main, "rotations": lab.domain.variants["rotations"] | other}
    return {"mix": parts, "source": None, "template": "plain"}


def horizon(lab: Lab) -> Row:
    """6.1: the longest response that is sampled and learnt from; and whether the teacher still knows better where the
    student has gone far."""
    whole = lab.domain.response
    runs = {
        str(length): succeeding(lab, rollout={"max_response": length})
        for length in (round(whole * share) for share in (0.125, 0.25, 0.5, 0.75, 1))
    }
    depths = [round(whole * share) for share in (0, 0.2, 0.4, 0.6, 0.8)]
    student, teacher = base(lab).model, rewarded(lab).model
    depth = analyse_depth(student.path, teacher.path, *_looked_at(lab), depths, 4, dtype="float32")
    row = _row({"base": base(lab), "rewarded": rewarded(lab)}, runs)
    return row | {"depth": {name: depth[name] for name in ("depths", "by_depth")}}


def horizon_collapsed(lab: Lab) -> Row:
    """Further to 6.1: where does the entropy rise in a run that is made to collapse, by a learning rate 15 times as
    high that does not fall?"""
    run = succeeding(lab, optimizer={"lr": 15 * lab.preset.lr, "schedule": "constant"})
    return _row({"base": base(lab), "rewarded": rewarded(lab)}, {"collapsed": run})


def rewards(lab: Lab) -> Row:
    """6.2: the mean reward of right and wrong rollouts, for a teacher that succeeds and two that fail, one of which
    knows no more than the student, and one of which knows all and thinks otherwise."""
    teachers = {"rewarded": rewarded(lab), "large": large(lab), "mismatched": other(lab)}
    paths = [run.model.path for run in teachers.values()]
    found = analyse_reward(base(lab).model.path, paths, *_looked_at(lab, 4), dtype="float32")
    kept = ("auroc", "auroc_within", "auroc_gain")
    of_teacher = [{name: row[name] for name in kept if name in row} for row in found["teachers"]]
    # ratio: what gradients of these norms that are orthogonal have does not depend on how unequal the norms are
    agreement = [row["coherence"]["all"] for row in gradients(lab)["teachers"]]
    kinds = {kind: [row[kind]["value"] for row in agreement] for kind in ("coherence", "ratio")}
    return _row({"base": base(lab)} | teachers, {}) | {
        "reward": dict(zip(teachers, of_teacher, strict=True)),
        **{kind: dict(zip(teachers, values, strict=True)) for kind, values in kinds.items()},
    }


def top_k(lab: Lab) -> Row:
    """6.3: sampled tokens against lists of k, by Eq. 5 and by the published code's objective; what each costs, and how
    far its gradient is from that of the full KL."""
    objectives: dict[str, Row] = {"sampled": {"name": "sampled"}, "full": {"name": "full"}}
    sizes = sorted({1, min(4, lab.domain.k), lab.domain.k})
    objectives |= {f"Eq. 5, k = {k}": {"name": "topk", "k": k} for k in sizes if k != lab.domain.k}
    objectives |= {f"published, k = {k}": {"name": "topk_reference", "k": k} for k in sizes}
    runs = {name: succeeding(lab, objective=objective) for name, objective in objectives.items()}
    runs[f"Eq. 5, k = {lab.domain.k}"] = succeeding(lab)
    found = gradients(lab)["teachers"][0]
    departs = [
        {"name": row["name"]} | {kind: row[kind] and row[kind]["batch"]["value"] for kind in ("bias", "noise")}
        for row in found["variants"]
    ]
    row = _row({"base": base(lab), "rewarded": rewarded(lab)}, runs)
    return row | {"gradients": departs, "noise_of_problems": found["batch"]["noise"]}


def top_k_closed(lab: Lab) -> Row:
    """Further to 6.3: lists of 4 with one outcome for all other tokens, and lists of twice as many."""
    k = min(4, lab.domain.k)
    runs = {
        "sampled": succeeding(lab, objective={"name": "sampled"}),
        "four": succeeding(lab, objective={"k": k}),
        "four and the rest": succeeding(lab, objective={"k": k, "tail": True}),
        "eight": succeeding(lab, objective={"name": "topk_reference", "k": min(8, lab.domain.k)}),
    }
    return _row({"base": base(lab), "rewarded": rewarded(lab)}, runs)


def remedy(lab: Lab) -> Row:
    """Beyond the paper: the failing teacher of 3.2 beside the reward of right answers."""
    p = lab.preset
    few = {"rollout": {"prompts": p.prompts // 4, "samples": 4}}
    runs = {
        "reward alone": lab.grpo("reward-alone", base(lab).model, lab.domain.main, p.steps, p.prompts // 4, 4),
        "teacher alone": failing(lab, **few),
        # as much weight as leaves its advantages, which are of size 1, the greater part of the gradient
        "with reward": failing(lab, reward={"terms": {"answer": 1.0}}, objective={"weight": 0.1}, **few),
    }
    return _row({"base": base(lab), "large": large(lab)}, runs)


EXPERIMENTS: dict[str, Callable[[Lab], Row]] = {
    "3.1": compatible_patterns,
    "3.2": new_knowledge,
    "3.3": reverse,
    "3.3+": reverse_forward,
    "3.3b": reverse_full,
    "4.1": signs,
    "4.2": supports,
    "4.2+": supports_closed,
    "5.1": cold_start,
    "5.2": prompts,
    "5.2+": prompts_tenth,
    "6.1": horizon,
    "6.1+": horizon_collapsed,
    "6.2": rewards,
    "6.3": top_k,
    "6.3+": top_k_closed,
    "remedy": remedy,
}


def _row(models: Mapping[str, Run], runs: Mapping[str, Run]) -> Row:
    return {
        "models": {name: {"accuracy": run.curve("accuracy")[-1]} for name, run in models.items()},
        "runs": {name: run.row() for name, run in runs.items()},
        # by what was trained, which experiments share
        "cpu_seconds": {run.model.key: run.cpu_seconds for run in (*models.values(), *runs.values())},
    }


def _looked_at(lab: Lab, samples: int = 1, rollouts: int = 0) -> tuple[Data, Sampling]:
    problems = (rollouts or lab.preset.rollouts) // samples
    held_out = Data.model_validate(lab.held_out(lab.domain.main))
    return held_out, Sampling(problems, samples, lab.domain.response, seed=lab.seed)
