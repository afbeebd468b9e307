"""A student, its teachers, and the student's own rollouts with what each of them says of every token.

What ``opd analyze`` and ``opd diagnose`` start from. Arrays of token values are [rows, R] on the host, NaN past the end
of a response; rows are ``samples`` neighbours for each prompt, and prompts are the clusters of every error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from opd_jax.config import Data
from opd_jax.data.pipeline import Overlong, encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import check_same_tokenizer, check_vocabulary, load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool, Verdict
from opd_jax.evaluation.heldout import (
    Panel,
    batches_of,
    collect,
    grade_panel,
    make_panel,
    ratio_with_error,
    sample_panel,
)
from opd_jax.losses import position_metrics
from opd_jax.mesh import Layout, batch_shards, make_mesh
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.models.hf import load_config, load_model
from opd_jax.sampling.decode import Engine, make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import over_passes, pack, write_pass
from opd_jax.sampling.states import hidden_states
from opd_jax.teacher import make_score, read_only
from opd_jax.tracking.console import console
from opd_jax.types import Params, Rollouts, Sequences

Values = dict[str, Float[np.ndarray, "rows R"]]

K = 16  # of the top-k lists (paper, default set-up)
BINS = 8  # of output positions


class Sampling(NamedTuple):
    """Which rollouts are looked at."""

    problems: int = 64  # the first so many
    samples: int = 4  # of each problem
    max_response: int = 1024  # tokens
    law: Law = Law()
    seed: int = 0
    fallback_number: bool = False  # an answer may be the last number of the response


@dataclasses.dataclass(frozen=True)
class Network:
    """A model on the mesh, and where it was loaded from."""

    path: Path
    params: Params
    config: DecoderConfig


@dataclasses.dataclass(frozen=True)
class Pair:
    """A student and teachers that read the same tokens; nothing is loaded yet but the tokenizer."""

    student: Path
    teachers: tuple[Path, ...]
    tokenizer: Any
    vocab_size: int
    stops: tuple[int, ...]  # of the student
    layout: Layout
    dtype: Any
    batch: int  # rows sampled, and scored, at a time

    @property
    def k(self) -> int:
        """Of the top-k lists: at most a quarter of the vocabulary, or they would overlap by chance."""
        return max(1, min(K, self.vocab_size // 4))

    @property
    def micro_batch(self) -> int:
        """Packed rows of one pass: an eighth of a batch, so that passes over empty rows do not run."""
        shards = batch_shards(self.layout)
        return shards * max(1, self.batch // (8 * shards))

    def names(self) -> list[str]:
        """Of the teachers: their directories' names, or paths where two have the same."""
        short = [path.name for path in self.teachers]
        return short if len(set(short)) == len(short) else [str(path) for path in self.teachers]

    def load(self, path: Path) -> Network:
        return Network(path, *load_model(path, self.layout, self.dtype))

    def engine(self, network: Network) -> Engine:
        """Samples from a network; a teacher may also end a response by its own end-of-sequence ids."""
        stops = tuple(sorted({*self.stops, *stop_ids(network.path, self.tokenizer)}))
        return _engine(
            network.config, stop_ids=stops, vocab_size=self.vocab_size, support=0, dtype=self.dtype, layout=self.layout
        )


def check_pair(student: Path, teachers: Sequence[Path], *, batch: int = 64, dtype: str = "bfloat16") -> Pair:
    """A student and teachers, refused where they cannot be compared token by token.

    Raises:
        InputError: no tokenizer or configuration to read, a tokenizer that maps ids to other texts than the student's,
            a model with fewer ids than its tokenizer, or no end-of-sequence id.
    """
    if twice := [path for path in teachers if list(teachers).count(path) > 1]:
        raise InputError(f"{twice[0]}: stands twice among the teachers. Give each once.")
    tokenizer = load_tokenizer(student)
    vocab_size = valid_vocab_size(tokenizer)
    stops = stop_ids(student, tokenizer)
    for path in (student, *teachers):
        if path in teachers:
            try:
                check_same_tokenizer(tokenizer, load_tokenizer(path))
            except InputError as e:
                raise InputError(f"{path}: {e}") from e
        check_vocabulary(path, load_config(path).vocab_size, vocab_size)
    layout = Layout(make_mesh())
    shards = batch_shards(layout)
    batch = -(-batch // shards) * shards
    return Pair(student, tuple(teachers), tokenizer, vocab_size, stops, layout, jnp.dtype(dtype), batch)


def load_panel(pair: Pair, data: Data, sampling: Sampling, *, graded: bool = True) -> tuple[Panel, Overlong]:
    """Prompts of ``data``, ``samples`` rows each, and how many were too long.

    Args:
        graded: refuse problems without an answer.

    Raises:
        InputError: what ``load_records`` and ``encode_prompts`` refuse; texts longer than a model is made for.
    """
    records = load_records(data, sampling.seed, require_answer=graded)
    encoded, records, overlong = encode_prompts(records, pair.tokenizer, data)
    encoded, records = encoded[: sampling.problems], records[: sampling.problems]
    longest = max(map(len, encoded))
    for path in (pair.student, *pair.teachers):
        if (left := load_config(path).longest_text - longest) < sampling.max_response:
            raise InputError(
                f"{path}: a prompt of {longest} tokens and a response of {sampling.max_response} are longer than the "
                f"{left + longest} tokens that the model is made for. Give --max-response {max(left, 1)} or less, or a "
                "smaller data.max_prompt."
            )
    prompts = stack_prompts(encoded, range(len(encoded)), longest, sampling.samples)
    texts, answers = [r.problem for r in records], [r.answer for r in records]
    return make_panel(prompts, texts, answers, pair.batch, batch_shards(pair.layout)), overlong


def described(pair: Pair, data: Data, sampling: Sampling, panel: Panel, overlong: Overlong) -> dict[str, Any]:
    """What an analysis of a pair was made from, for its result."""
    return {
        "student": str(pair.student),
        "source": data.title,
        "data": data.model_dump(mode="json", exclude_defaults=True),
        "problems": len(panel.problems),
        "dropped_prompts": overlong.dropped,
        "samples": sampling.samples,
        "max_response": sampling.max_response,
        **{name: float(value) for name, value in sampling.law._asdict().items()},
        "seed": sampling.seed,
        "k": pair.k,
        "dtype": str(pair.dtype),
    }


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rollouts of one model on a panel. ``rollouts`` also holds the rows that fill up the last batch."""

    panel: Panel
    rollouts: Rollouts
    texts: list[str]
    verdicts: list[Verdict] | None  # None: the prompts have no answers
    summary: dict[str, Any]  # accuracy, lengths, truncation, see evaluation/summary.py

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.rollouts.lengths)[: self.panel.rows]

    @property
    def correct(self) -> Bool[np.ndarray, "problems samples"]:
        """Of a panel with answers."""
        assert self.verdicts is not None
        return np.array([v.correct for v in self.verdicts]).reshape(-1, self.panel.samples)


def draw_rollouts(
    pair: Pair, network: Network, panel: Panel, pool: AnswerPool, sampling: Sampling, title: str
) -> Drawn:
    """One graded response to every row of a panel. Models that are equal give equal responses: their random numbers
    depend on (seed, prompt, sample, position) alone.

    Raises:
        InputError: log-probabilities that are not finite.
    """
    engine = pair.engine(network)
    weights, seed, limit = engine.cast(network.params), sampling.seed, sampling.max_response
    rollouts = sample_panel(engine, weights, panel, sampling.law, seed, limit, title)
    inside = np.arange(limit) < np.asarray(rollouts.lengths)[:, None]
    if not np.isfinite(np.asarray(rollouts.logp)[inside]).all():
        raise InputError(
            f"{network.path}: its log-probabilities are not finite. Its weights are damaged, or overflow: look at "
            "them, or try --dtype float32."
        )
    summary, texts, verdicts = grade_panel(rollouts, panel, pair.tokenizer, pool)
    return Drawn(panel, rollouts, texts, verdicts, summary)


def token_values(
    pair: Pair, student: Network, teacher: Network, drawn: Drawn, *, title: str = "scoring", separate: bool = False
) -> Values:
    """What student and teacher say of each token of rollouts: ``losses.position_metrics`` (Eqs. 6–10, divergences), the
    log-probabilities ``logp`` and ``logq`` of the token that was sampled, and ``reward`` = logq − logp; nats.

    ``overlap_advantage`` is NaN also where the lists share no id, as Eq. 7 has no value there.

    Args:
        separate: one sequence a row, rather than as many as fit; it changes nothing but rounding.
    """
    common = {"dtype": pair.dtype, "layout": pair.layout, "micro_batch": pair.micro_batch}
    score = _scorer(teacher.config, **common)
    measure = _measurer(student.config, k=pair.k, vocab_size=pair.vocab_size, **common)
    found = []
    with console.progress(len(drawn.panel.batches), title, unit="batch", show=()) as bar:
        for part in batches_of(drawn.rollouts, drawn.panel):
            host = pack(part, separate=separate, multiple=pair.micro_batch, layout=pair.layout)
            rows = pair.layout.put_rows(host)
            scores = score(teacher.params, rows)
            values = measure(student.params, read_only(rows), scores.hidden, scores.head)
            found.append(by_response(host, jax.device_get(values), len(part.lengths)))
            bar.advance()
    values = collect(found, drawn.panel)
    values["overlap_advantage"] = np.where(values["overlap_ratio"] > 0, values["overlap_advantage"], np.nan)
    values["reward"] = -values["kl_k1"]
    if np.isfinite(values["reward"]).sum() != drawn.lengths.sum():
        raise InputError(
            f"{teacher.path}: its log-probabilities are not finite. Its weights are damaged, or overflow: look at "
            "them, or try --dtype float32."
        )
    return values


def by_response(rows: Sequences, values: Mapping[str, np.ndarray], sequences: int) -> Values:
    """[M, T] values of packed rows at the response tokens of each sequence, [sequences, R]; NaN elsewhere."""
    mask = np.asarray(rows.mask)
    at = np.asarray(rows.segments)[mask] - 1, np.asarray(rows.depth)[mask]
    out = {}
    for name, value in values.items():
        out[name] = np.full((sequences, rows.max_response), np.nan, np.float32)
        out[name][at] = value[mask]
    return out


def token_mean(values: Float[np.ndarray, "rows R"], prompts: int) -> tuple[float, float]:
    """Mean over all tokens that have a value, and its standard error, with prompts as clusters."""
    held = np.isfinite(values)
    return ratio_with_error(np.where(held, values, 0).sum(axis=1, dtype=np.float64), held.sum(axis=1), prompts)


def depth_edges(longest: int, bins: int = BINS) -> np.ndarray:
    """Bounds of at most ``bins`` equal ranges of output positions that cover ``longest`` tokens."""
    return np.unique(np.round(np.linspace(0, longest, bins + 1)).astype(int))


def by_depth(values: Float[np.ndarray, "rows R"], edges: np.ndarray, prompts: int) -> list[dict[str, Any]]:
    """Mean, error and tokens of each range of output positions [start, end)."""
    rows = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[:, start:end]
        mean, error = token_mean(part, prompts)
        rows.append({"start": start, "end": end, "mean": mean, "error": error, "tokens": int(np.isfinite(part).sum())})
    return rows


# what is compiled once serves every model of the same shape
_engine, _scorer = functools.cache(make_engine), functools.cache(make_score)


@functools.cache
def _measurer(student: DecoderConfig, *, k: int, vocab_size: int, dtype: Any, layout: Layout, micro_batch: int) -> Any:
    def values(params: Params, part: Sequences, teacher_hidden: Array, teacher_head: Array) -> dict[str, Array]:
        hidden = hidden_states(params, student, part, dtype=dtype, layout=layout)
        found = position_metrics(
            hidden, head(params), teacher_hidden, teacher_head, part.targets, part.mask,
            k=k, vocab_size=vocab_size, layout=layout, lists=1,
        )  # fmt: skip
        return {name: x for name, x in found.items() if x.ndim == 2}  # without the lists

    @jax.jit
    def measure(params: Params, rows: Sequences, teacher_hidden: Array, teacher_head: Array) -> dict[str, Array]:
        shapes = jax.eval_shape(values, params, rows, teacher_hidden, teacher_head)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(whole: dict[str, Array], i: Any, part: Sequences, teacher_hidden: Array) -> dict[str, Array]:
            new = values(params, part, teacher_hidden, teacher_head)
            return {name: write_pass(whole[name], i, new[name], layout) for name in whole}

        return over_passes(add, zeros, rows, teacher_hidden, micro_batch=micro_batch, layout=layout)

    return measure
