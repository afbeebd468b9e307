"""Held-out prompts: fresh rollouts, their accuracy, and how far the student is from its teacher on them.

Every evaluation of a run uses the same random numbers, so that differences between steps are paired.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from opd_jax import hosts
from opd_jax.losses import position_metrics
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import over_passes
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Params, Prompts, Rollouts, Sequences

EVALUATION_STEP = 2**31 - 1  # the "step" of the random-number law; no training step reaches it

MEASURED = (
    "reverse_kl",
    "forward_kl",
    "overlap_ratio",
    "overlap_advantage",
    "entropy_gap",
    "student_entropy",
    "teacher_entropy",
    "overlap_mass_student",
    "overlap_mass_teacher",
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Held-out prompts in batches of equal size; the last is filled up by repetition, ``rows`` tells the real ones."""

    batches: tuple[Prompts, ...]
    rows: int
    samples: int  # consecutive rows of one prompt
    problems: tuple[str, ...]  # one a prompt
    answers: tuple[str | None, ...]


def make_panel(prompts: Prompts, problems: Sequence[str], answers: Sequence[str | None], batch: int) -> Panel:
    """Cuts stacked prompts (equally many consecutive rows for each problem) into batches of ``batch`` rows."""
    rows = len(prompts.lengths)
    starts = range(0, rows, batch)
    batches = tuple(jax.tree.map(lambda x, s=s: x[np.arange(s, s + batch) % rows], prompts) for s in starts)
    return Panel(batches, rows, rows // len(problems), tuple(problems), tuple(answers))


def sample_panel(
    rollout: Callable[..., Rollouts], weights: Params, panel: Panel, law: Law, seed: int
) -> Iterator[Rollouts]:
    """The rollouts of one evaluation, batch by batch, on the device; ``weights`` as ``rollout`` takes them."""
    for prompts in panel.batches:
        yield rollout(weights, prompts, law, seed, EVALUATION_STEP)


def make_measure(
    student: DecoderConfig,
    *,
    k: int,
    vocab_size: int,
    dtype: Any,
    layout: Layout | None,
    micro_batch: int | None = None,
) -> Callable[[Params, Sequences, Array, Array], tuple[dict[str, tuple[Array, Array]], Array]]:
    """Builds the jitted ``measure(student_params, rows, teacher_hidden, teacher_head)`` → {name: (sum, count)}, kl.

    The metrics of paper.md Eqs. 6–10 and both divergences, summed over each sequence's response tokens: arrays [M], of
    sequences in the order of their batch (and zeros, if it has fewer). ``kl`` [M, R]: the reverse KL at every token of
    their responses, in nats.
    """

    def measure(
        params: Params, rows: Sequences, teacher_hidden: Array, teacher_head: Array
    ) -> tuple[dict[str, tuple[Array, Array]], Array]:
        def add(totals: tuple[Array, Array], _: Any, part: Sequences, teacher_hidden: Array) -> tuple[Array, Array]:
            hidden = hidden_states(params, student, part, dtype=dtype, layout=layout)
            values = position_metrics(
                hidden, head(params), teacher_hidden, teacher_head, part.targets, part.mask,
                k=k, vocab_size=vocab_size, layout=layout,
            )  # fmt: skip
            shared = part.mask & (values["overlap_ratio"] > 0)  # elsewhere Eq. 7 has no value
            masks = dict.fromkeys(MEASURED, part.mask) | {"overlap_advantage": shared}
            sums, kl = totals
            both = [[jnp.where(masks[n], values[n], 0), masks[n].astype(sums.dtype)] for n in MEASURED]
            sums = sums.at[part.segments].add(jnp.moveaxis(jnp.array(both), (0, 1), (2, 3)))
            return sums, kl.at[part.segments, part.depth].add(jnp.where(part.mask, values["reverse_kl"], 0))

        of_rows = functools.partial(jnp.zeros, dtype=jnp.promote_types(dtype, jnp.float32))
        M = rows.tokens.shape[0] + 1
        zeros = of_rows((M, len(MEASURED), 2)), of_rows((M, rows.max_response))
        sums, kl = over_passes(add, zeros, rows, teacher_hidden, micro_batch=micro_batch, layout=layout)
        return {name: (sums[1:, i, 0], sums[1:, i, 1]) for i, name in enumerate(MEASURED)}, kl[1:]

    return jax.jit(measure, out_shardings=layout.sharding() if layout else None)


def collect(parts: Sequence[Any], panel: Panel) -> Any:
    """Concatenates batches on the host and drops the rows that only filled up the last one."""
    host = [hosts.fetch(p) for p in parts]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: panel.rows], *host)


def ratio_with_error(sums: np.ndarray, counts: np.ndarray, groups: int) -> tuple[float, float]:
    """Σ sums / Σ counts and its standard error, with rows of one prompt (``groups`` prompts) as one cluster."""
    s, c = (np.asarray(x, np.float64).reshape(groups, -1).sum(axis=1) for x in (sums, counts))
    if c.sum() == 0:
        return math.nan, math.nan
    mean = s.sum() / c.sum()
    residual = s - mean * c
    error = math.sqrt(groups / max(groups - 1, 1) * float((residual**2).sum())) / c.sum() if groups > 1 else math.nan
    return float(mean), float(error)


def summarise_lengths(lengths: ArrayLike, stopped: ArrayLike, panel: Panel) -> dict[str, float]:
    """Response length (tokens), truncation and end-of-sequence rates of all rows of a panel."""
    lengths, stopped = np.asarray(lengths), np.asarray(stopped)
    n = len(panel.problems)
    length, error = ratio_with_error(lengths, np.ones_like(lengths), n)
    return {
        "problems": n,
        "samples": panel.samples,
        "response_length": length,
        "response_length_se": error,
        "truncation_rate": float(np.mean(~stopped)),
        "eos_rate": float(np.mean(stopped)),
    }


def responses(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Decoded texts of collected rollouts, without special tokens."""
    rows = zip(np.asarray(rollouts.tokens), np.asarray(rollouts.lengths), strict=True)
    return [tokenizer.decode(tokens[:n].tolist(), skip_special_tokens=True) for tokens, n in rows]


def token_texts(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token where it stands; bytes that are no character by themselves show as \ufffd."""
    texts = []
    for i in range(len(tokens)):
        # after the token before it, or tokenizers that mark words by a leading space drop that
        before, both = tokenizer.decode(tokens[max(i - 1, 0) : i]), tokenizer.decode(tokens[max(i - 1, 0) : i + 1])
        texts.append(both[len(before) :] if both.startswith(before) else tokenizer.decode([tokens[i]]))
    return texts


def mean_metrics(
    measured: dict[str, tuple[Any, Any]], panel: Panel, only: Sequence[str] = MEASURED
) -> dict[str, float]:
    """{name, name_se} of collected per-row sums."""
    out: dict[str, float] = {}
    for name in only:
        out[name], out[name + "_se"] = ratio_with_error(*measured[name], len(panel.problems))
    return out


def grade_rows(
    panel: Panel, texts: Sequence[str], grade: Callable[[list[tuple[str, str]]], list[bool]]
) -> np.ndarray | None:
    """[problems, samples] of right answers; None where the prompts have no answers."""
    if any(a is None for a in panel.answers):
        return None
    gold = [str(panel.answers[i // panel.samples]) for i in range(panel.rows)]
    return np.asarray(grade(list(zip(texts, gold, strict=True)))).reshape(-1, panel.samples)
