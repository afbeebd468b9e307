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

from opd_jax import hosts
from opd_jax.evaluation.answers import AnswerPool, Verdict
from opd_jax.evaluation.summary import summarise_lengths, summarise_verdicts
from opd_jax.generate import SHOWN, Meter
from opd_jax.losses import position_metrics
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.decode import Engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import over_passes
from opd_jax.sampling.scheduler import make_rollout
from opd_jax.sampling.states import hidden_states
from opd_jax.tracking.console import console
from opd_jax.types import Params, Prompts, Rollouts, Sequences

Row = dict[str, Any]

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

LISTED = 5  # most probable ids of a token that a sample shows
DETAILED = 384  # tokens at each end of a response of which a sample shows more than the text
BY_TOKEN = (
    "reverse_kl",
    "logp",
    "logq",
    "student_top_ids",
    "student_top_logp",
    "teacher_top_ids",
    "teacher_top_logp",
)


@dataclasses.dataclass(frozen=True)
class Panel:
    """Held-out prompts. The rows from ``rows`` on only fill up the last batch, by repetition."""

    prompts: Prompts  # NumPy
    batches: tuple[np.ndarray, ...]  # indices of the rows that are measured together, equally many
    samples: int  # consecutive rows of one prompt
    problems: tuple[str, ...]  # one a prompt
    answers: tuple[str | None, ...]

    @property
    def rows(self) -> int:
        return len(self.problems) * self.samples


def batch_rows(rows: int, batch: int, shards: int) -> int:
    """Rows of each batch, and slots: about ``batch``, so that all batches are alike and divide over the shards."""
    batches = -(-rows // batch)
    return -(-rows // (batches * shards)) * shards


def make_panel(
    prompts: Prompts, problems: Sequence[str], answers: Sequence[str | None], batch: int, shards: int = 1
) -> Panel:
    """A panel of stacked prompts, equally many consecutive rows for each problem.

    Args:
        shards: parts that the rows are cut into, in order; every one gives its share to each batch, so that responses
            are measured by the process that holds them.
    """
    rows = len(prompts.lengths)
    size = batch_rows(rows, batch, shards)
    whole = jax.tree.map(lambda x: np.asarray(x)[np.arange(-(-rows // size) * size) % rows], prompts)
    shares = np.arange(len(whole.lengths)).reshape(shards, -1, size // shards)
    batches = tuple(shares[:, i].reshape(-1) for i in range(shares.shape[1]))
    return Panel(whole, batches, rows // len(problems), tuple(problems), tuple(answers))


def sample_panel(
    engine: Engine, weights: Params, panel: Panel, law: Law, seed: int, max_response: int, title: str = "evaluating"
) -> Rollouts:
    """One response to each row of a panel, through one queue with as many slots as a batch has rows; on the host.

    ``weights``: ``engine.cast(params)``. Of several processes each gets the tokens of its own rows.
    """
    rollout = make_rollout(engine, max_response=max_response, slots=len(panel.batches[0]))
    with console.progress(len(panel.prompts.lengths), title, unit="response", show=SHOWN) as bar:
        meter = Meter(bar)
        rollouts = rollout(weights, panel.prompts, law, seed, EVALUATION_STEP, occupancy=meter)
        bar.update(meter.finished, meter.row())
    return rollouts


def batches_of(rollouts: Rollouts, panel: Panel) -> Iterator[Rollouts]:
    """The batches in which the rollouts of a panel are measured."""
    for rows in panel.batches:
        yield jax.tree.map(lambda x, rows=rows: x[rows], rollouts)


@functools.lru_cache(maxsize=8)  # runs of one process share what is compiled
def make_measure(
    student: DecoderConfig,
    *,
    k: int,
    vocab_size: int,
    dtype: Any,
    layout: Layout | None,
    micro_batch: int | None = None,
    shown: int = 0,
) -> Callable[[Params, Sequences, Array, Array], tuple[dict[str, tuple[Array, Array]], dict[str, Array]]]:
    """Builds the jitted ``measure(student_params, rows, teacher_hidden, teacher_head)`` → {name: (sum, count)}, tokens.

    The metrics of paper.md Eqs. 6–10 and both divergences, summed over each sequence's response tokens: arrays [M], of
    sequences in the order of their batch (and zeros, if it has fewer). ``tokens``: what ``BY_TOKEN`` lists of the first
    ``shown`` sequences, [shown, R, …]: nats, and the ``LISTED`` most probable ids of both sides.
    """

    def measure(
        params: Params, rows: Sequences, teacher_hidden: Array, teacher_head: Array
    ) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
        M, of_rows = rows.tokens.shape[0], functools.partial(jnp.zeros, dtype=jnp.promote_types(dtype, jnp.float32))
        first = min(shown, M)

        def values_of(part: Sequences, teacher_hidden: Array) -> dict[str, Array]:
            hidden = hidden_states(params, student, part, dtype=dtype, layout=layout)
            return position_metrics(
                hidden, head(params), teacher_hidden, teacher_head, part.targets, part.mask,
                k=k, vocab_size=vocab_size, layout=layout, lists=LISTED if first else 0,
            )  # fmt: skip

        def add(totals: tuple[Array, Any], _: Any, part: Sequences, teacher_hidden: Array) -> tuple[Array, Any]:
            values = values_of(part, teacher_hidden)
            shared = part.mask & (values["overlap_ratio"] > 0)  # elsewhere Eq. 7 has no value
            masks = dict.fromkeys(MEASURED, part.mask) | {"overlap_advantage": shared}
            sums, tokens = totals
            both = [[jnp.where(masks[n], values[n], 0), masks[n].astype(sums.dtype)] for n in MEASURED]
            sums = sums.at[part.segments].add(jnp.moveaxis(jnp.array(both), (0, 1), (2, 3)))

            def write(to: Array, x: Array) -> Array:
                x = jnp.where(part.mask.reshape(*part.mask.shape, *[1] * (x.ndim - 2)), x, 0)
                return to.at[part.segments, part.depth].add(x.astype(to.dtype), mode="drop")

            return sums, {n: write(tokens[n], values[n]) for n in tokens}

        shapes = jax.eval_shape(values_of, rows, teacher_hidden)
        # segments count from 1; padding is 0
        tokens = {
            n: jnp.zeros((first + 1, rows.max_response, *shapes[n].shape[2:]), shapes[n].dtype)
            for n in BY_TOKEN
            if first
        }
        zeros = of_rows((M + 1, len(MEASURED), 2)), tokens
        sums, tokens = over_passes(add, zeros, rows, teacher_hidden, micro_batch=micro_batch, layout=layout)
        by_row = {name: (sums[1:, i, 0], sums[1:, i, 1]) for i, name in enumerate(MEASURED)}
        return by_row, {name: x[1:] for name, x in tokens.items()}

    return jax.jit(measure, out_shardings=layout.sharding() if layout else None)


def collect(parts: Sequence[Any], panel: Panel) -> Any:
    """What was measured batch by batch, in the order of the panel's rows, on the host."""
    host = [hosts.fetch(p) for p in parts]
    order = np.argsort(np.concatenate(panel.batches))[: panel.rows]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[order], *host)


def ratio_with_error(sums: np.ndarray, counts: np.ndarray, groups: int) -> tuple[float, float]:
    """Σ sums / Σ counts and its standard error, with rows of one prompt (``groups`` prompts) as one cluster."""
    s, c = (np.asarray(x, np.float64).reshape(groups, -1).sum(axis=1) for x in (sums, counts))
    if c.sum() == 0:
        return math.nan, math.nan
    mean = s.sum() / c.sum()
    residual = s - mean * c
    error = math.sqrt(groups / max(groups - 1, 1) * float((residual**2).sum())) / c.sum() if groups > 1 else math.nan
    return float(mean), float(error)


def responses(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """Texts of rollouts on the host, without special tokens."""
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


def token_row(tokens: Any, by_token: dict[str, np.ndarray], tokenizer: Any) -> Row:
    """A response as its sample row shows it: the text of every token, and what is known of the first and last ones.

    ``kl_by_token``, ``logp``, ``logq`` (nats), ``top_student`` and ``top_teacher`` ([text, probability], most probable
    first) are of the first and last ``DETAILED`` tokens, so that a row stays small however long the response is.
    """
    tokens = np.asarray(tokens).tolist()
    if not tokens:
        return {"tokens": []}
    n = len(tokens)
    at = np.arange(n) if n <= 2 * DETAILED else np.r_[:DETAILED, n - DETAILED : n]
    row: Row = {"tokens": token_texts(tokens, tokenizer)}
    for name, key in (("kl_by_token", "reverse_kl"), ("logp", "logp"), ("logq", "logq")):
        row[name] = [round(x, 4) for x in by_token[key][at].tolist()]

    @functools.cache
    def text(token: int) -> str:
        return token_texts([tokens[0], token], tokenizer)[1]

    for who in ("student", "teacher"):
        ids, p = by_token[f"{who}_top_ids"][at].tolist(), np.exp(by_token[f"{who}_top_logp"][at]).tolist()
        row[f"top_{who}"] = [
            [[text(i), float(f"{x:.3g}")] for i, x in zip(*of_token, strict=True)]
            for of_token in zip(ids, p, strict=True)
        ]
    return row


def mean_metrics(
    measured: dict[str, tuple[Any, Any]], panel: Panel, only: Sequence[str] = MEASURED
) -> dict[str, float]:
    """{name, name_se} of collected per-row sums."""
    out: dict[str, float] = {}
    for name in only:
        out[name], out[name + "_se"] = ratio_with_error(*measured[name], len(panel.problems))
    return out


def grade_panel(
    rollouts: Rollouts, panel: Panel, tokenizer: Any, pool: AnswerPool
) -> tuple[Row, list[str], list[Verdict] | None]:
    """Numbers of the responses to a panel, their texts and verdicts; no verdicts where the prompts have no answers.

    ``rollouts``: of all rows, and with all tokens.
    """
    texts = responses(rollouts, tokenizer)[: panel.rows]
    lengths, stopped = (np.asarray(x)[: panel.rows] for x in (rollouts.lengths, rollouts.stopped))
    row = summarise_lengths(lengths, stopped, panel.samples)
    if None in panel.answers:
        return row, texts, None
    verdicts = pool.judge([(text, str(panel.answers[i // panel.samples])) for i, text in enumerate(texts)])
    return row | summarise_verdicts(verdicts, panel.samples), texts, verdicts
