"""``opd analyze gradients``: do the gradients of tokens agree or cancel, and how far is an objective from the full KL?

Paper §6.2 leaves it open why a teacher whose reward tells right from wrong can fail: its token gradients may cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax.analysis.coherence import Coherence, bilinear, by_problem, coherence, cosines, linear, mean
from opd_jax.analysis.estimates import prompt_weights
from opd_jax.analysis.pair import Drawn, Sampling, check_pair, depth_edges, described, draw_rollouts, load_panel
from opd_jax.analysis.token_gradients import (
    CLASSES,
    FULL,
    NO_GRADIENT,
    SAMPLED,
    VARIANTS,
    Both,
    Gradients,
    check_exact,
    choose_states,
)
from opd_jax.analysis.token_gradients import token_gradients as measure
from opd_jax.config import Data
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.models.hf import load_config, load_model
from opd_jax.tracking.writers import plain

Row = dict[str, Any]

KIND = "gradients"
QUANTILES = (5, 25, 50, 75, 95)
BARS = 30


def analyse_gradients(
    student: Path,
    teachers: Sequence[Path],
    data: Data,
    sampling: Sampling,
    *,
    tokens: int = 512,
    directions: int | None = None,
    **settings: Any,
) -> Row:
    """Samples rollouts of the student and compares the token gradients of the full KL to each teacher on them.

    Args:
        tokens: how many tokens are looked at, spread over all rollouts.
        directions: of random projections; 0: exact; None: exact where the model is small.
        settings: of ``check_pair``.

    Raises:
        InputError: a pair or prompts that are refused, exact gradients of a model that is too large.
    """
    pair = check_pair(student, teachers, **settings)
    panel, overlong = load_panel(pair, data, sampling, graded=False)
    if directions == 0:
        check_exact(load_config(student), min(tokens, panel.rows * sampling.max_response), panel.rows)
    network = pair.load(student)
    with AnswerPool(fallback_number=sampling.fallback_number) as pool:
        drawn = draw_rollouts(pair, network, panel, pool, sampling, student.name)
    states = choose_states(drawn.lengths, tokens, sampling.samples)
    weights = prompt_weights(len(panel.problems))
    rollouts = jax.tree.map(lambda x: np.asarray(x)[: panel.rows], drawn.rollouts)
    del network  # drawn from in the precision of ``pair``; its gradients are of the weights as training has them
    params, own = load_model(student)
    result: Row = {"kind": KIND} | described(pair, data, sampling, panel, overlong)
    result |= {"tokens": len(states.sequence), "of_tokens": int(drawn.lengths.sum()), "teachers": []}
    result["accuracy"] = drawn.summary.get("accuracy")
    first: Coherence | None = None
    for name, path in zip(pair.names(), teachers, strict=True):
        weights_of_teacher, other = load_model(path)
        both = Both(own, other, pair.vocab_size, pair.k, tuple(VARIANTS.items()))
        title = f"gradients, {name}"
        found = measure(
            both, params, weights_of_teacher, rollouts, states,
            seed=sampling.seed, directions=directions, title=title,
        )  # fmt: skip
        row = {"name": name, "path": str(path)} | described_gradients(found, drawn, weights)
        whole = coherence(found.token, states.problem, np.ones(len(states.sequence), bool), weights)
        if row["defined"] and whole:
            if first:
                compared = {"coherence": whole.value - first.value, "ratio": whole.ratio - first.ratio}
                row["difference"] = {key: x.row(len(panel.problems)) for key, x in compared.items()}
            first = first or whole
        result["teachers"].append(row)
    return plain(result)


def described_gradients(found: Gradients, drawn: Drawn, weights: np.ndarray) -> Row:
    """Everything that the gradients of one teacher tell; little where they are 0."""
    defined = found.logit_norm > NO_GRADIENT
    head: Row = {"defined": defined, "directions": found.directions, "logit_norm": found.logit_norm}
    if not defined:
        return head
    states, problems, gram = found.states, weights.shape[1], found.token
    everything = np.ones(len(states.sequence), bool)
    groups = {"all": everything}
    if drawn.verdicts is not None:
        right = drawn.correct.ravel()[states.sequence]
        groups |= {"right": right, "wrong": ~right}
    groups |= {name: found.classes == i for i, name in enumerate(CLASSES)}
    own = found.sums[0, :, 0]
    present = np.unique(states.sequence)
    of_sequence = np.arange(len(own)) // drawn.panel.samples
    held = {name: coherence(gram, states.problem, mask, weights) for name, mask in groups.items()}
    held["sequences"] = coherence(own, of_sequence, np.isin(np.arange(len(own)), present), weights)
    norms = np.sqrt(np.diag(gram))
    return head | {
        "coherence": {name: x and x.row(problems) for name, x in held.items()},
        "norms": {name: _norms(norms, mask, states.problem, weights) for name, mask in groups.items() if mask.any()},
        "histogram": _histogram(norms),
        "batch": _batch(gram, states.problem, weights),
        "by_depth": _by_depth(gram, norms, found, weights),
        "cosines": _cosines(found, own, of_sequence, weights),
        "variants": [_variant(found, i, drawn.panel.samples, weights) for i in range(len(VARIANTS))],
    }


def _norms(norms: np.ndarray, mask: np.ndarray, problem: np.ndarray, weights: np.ndarray) -> Row:
    of = by_problem(problem, weights.shape[1], mask)
    quantiles = {str(q): float(np.percentile(norms[mask], q)) for q in QUANTILES}
    return {"mean": mean(norms, of, weights).row(), "quantiles": quantiles, "tokens": int(mask.sum())}


def _histogram(norms: np.ndarray) -> Row:
    logs = np.log10(norms[norms > 0])
    counts, edges = np.histogram(logs, BARS)
    return {"edges": edges, "counts": counts, "zero": int((norms == 0).sum())}


def _batch(gram: np.ndarray, problem: np.ndarray, weights: np.ndarray) -> Row:
    """The mean gradient, and its noise from the problems that were drawn: √(N/(N−1) Σ ‖S_i − S̄‖²) / ‖Σ S_i‖."""
    problems = weights.shape[1]
    of = by_problem(problem, problems, np.ones(len(gram), bool))
    pairs = of @ gram @ of.T
    total, norm = pairs.sum(), bilinear(pairs, weights).root()
    spread = problems / max(problems - 1, 1) * (np.trace(pairs) - total / problems)
    noise = float(np.sqrt(max(spread, 0) / total)) if total > 0 and problems > 1 else None
    return {"norm": norm.over(linear(of.sum(1), weights)).row(problems), "noise": noise}


def _by_depth(gram: np.ndarray, norms: np.ndarray, found: Gradients, weights: np.ndarray) -> list[Row]:
    states, rows = found.states, []
    edges = depth_edges(int(states.position.max()) + 1)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mask = (states.position >= start) & (states.position < end)
        row: Row = {"start": start, "end": end, "tokens": int(mask.sum()), "coherence": None, "norm": None}
        if mask.any():
            row["norm"] = mean(norms, by_problem(states.problem, weights.shape[1], mask), weights).row()
        if held := coherence(gram, states.problem, mask, weights):
            row["coherence"] = held.row(weights.shape[1])
        rows.append(row)
    return rows


def _cosines(found: Gradients, own: np.ndarray, of_sequence: np.ndarray, weights: np.ndarray) -> Row:
    states = found.states
    same, problem = (x[:, None] == x for x in (states.sequence, states.problem))
    tokens = {"same rollout": same, "same problem": problem & ~same, "other problems": ~problem}
    between = of_sequence[:, None] == of_sequence
    return {
        "tokens": cosines(found.token, tokens, states.problem, weights),
        "sequences": cosines(own, {"same problem": between, "other problems": ~between}, of_sequence, weights),
    }


def _variant(found: Gradients, i: int, samples: int, weights: np.ndarray) -> Row:
    """Bias of an objective's expected gradient, and the noise of ``sampled``, relative to the full KL's gradient: at
    one token (root of a ratio of sums over tokens), of a rollout's sum, of the sum of all."""
    name, states, problems = list(VARIANTS)[i], found.states, weights.shape[1]
    of = by_problem(states.problem, problems, np.ones(len(states.sequence), bool))
    per_sequence = by_problem(np.arange(states.sequences) // samples, problems, np.ones(states.sequences, bool))
    ff, fi, ii = (found.sums[a, :, b] for a, b in ((0, 0), (0, i), (i, i)))
    squares, distances = (linear(of @ x, weights) for x in (found.squares[0], found.distances[i]))
    sequence = linear(per_sequence @ np.diag(ff), weights)

    def across(pairs: np.ndarray) -> Any:
        return bilinear(per_sequence @ pairs @ per_sequence.T, weights)

    full = across(ff)
    at_token = distances.over(squares).root().row(problems)
    held = None
    if found.squares[i].sum() > 1e-12 * found.squares[0].sum():
        norms = np.sqrt(found.squares[i])
        held = across(ii).root().over(linear(of @ norms, weights)).row(problems)
    row: Row = {"name": name, "coherence": held, "cosine": None, "bias": None, "noise": None}
    if name == SAMPLED:
        at_sequence, at_batch = (distances.over(x).root().row(problems) for x in (sequence, full))
        return row | {"noise": {"token": at_token, "sequence": at_sequence, "batch": at_batch}}
    rest = ii + ff - fi - fi.T
    at_sequence = linear(per_sequence @ np.diag(rest), weights).over(sequence).root().row(problems)
    at_batch = across(rest).over(full).root().row(problems)
    row["bias"] = {"token": at_token, "sequence": at_sequence, "batch": at_batch}
    if held and name != FULL:
        scale = across(ii).root(), full.root()
        cosine = across((fi + fi.T) / 2).over(scale[0]).over(scale[1])
        row["cosine"] = cosine.row(problems)
    return row
