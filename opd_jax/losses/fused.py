"""Losses, metrics and gradients from hidden states and head weights, without logits for all tokens at once.

The gradient is formed in the forward pass, so that no product with the vocabulary is done twice. Tokens pass in two
levels: tiles, so small that the many elementwise passes over their logits stay in cache, and chunks of tiles, so large
that the [V, D] head gradient is read and written rarely. In between stands dloss/dlogits of one chunk, in the dtype of
the hidden states.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint

from opd_jax.config import Objective
from opd_jax.losses.metrics import token_metrics
from opd_jax.losses.reference import FILL, divergence
from opd_jax.losses.supports import Picks, support_ids, token_loss
from opd_jax.losses.vocabulary import Readout, Vocabulary
from opd_jax.mesh import Axes, Layout, constrain


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static: the objective, the sizes, and which products with the whole vocabulary are needed."""

    objective: Objective
    vocab: int  # valid ids
    given_ids: bool
    rewarded: bool  # advantages are given
    chunk: int
    tile: int
    layout: Layout | None
    metric_k: int  # 0: no metrics
    student_readout: Readout  # without their biases
    teacher_readout: Readout
    lists: int = 0  # of both top-k lists, how much comes with the metrics

    @property
    def sparse(self) -> bool:
        """Renormalised top-k: loss and gradient live on the logits of the support."""
        o = self.objective
        return o.name == "topk" and o.normalise and not o.tail and not self.rewarded

    @property
    def k(self) -> int:
        return min(self.objective.k, self.vocab) if self.objective.name.startswith("topk") else 0

    @property
    def student_vocabulary(self) -> bool:
        needs_ids = self.objective.support != "teacher" and not self.given_ids
        return not self.sparse or needs_ids or self.metric_k > 0

    @property
    def teacher_vocabulary(self) -> bool:
        return not self.sparse or self.objective.support != "student" or self.metric_k > 0

    @property
    def batch_axes(self) -> tuple[str, ...]:
        return self._axes("batch")

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        return self._axes("vocab")

    @property
    def embed_axes(self) -> tuple[str, ...]:
        return self._axes("embed")

    def scatters(self, width: int) -> bool:
        """Whether the shards of the width are shards of the batch, too, and divide it."""
        axes = self.embed_axes
        if not axes or not set(axes) <= set(self.batch_axes):
            return False
        assert self.layout
        return width % math.prod(self.layout.mesh.shape[a] for a in axes) == 0

    def _axes(self, name: str) -> tuple[str, ...]:
        axes = dict(self.layout.table)[name] if self.layout else ()
        return axes if self.layout and math.prod(self.layout.mesh.shape[a] for a in axes) > 1 else ()

    def vocabulary(self, heads: _Heads) -> Vocabulary:
        return Vocabulary(min(head.weight.shape[0] for head in heads), self.vocab, self.vocab_axes)


class Tokens(NamedTuple):
    """What stands at each token and carries no gradient: [B, T, ...], or [C, ...] in a tile."""

    teacher_hidden: Array
    tokens: Array
    mask: Array
    weight: Array
    topk_ids: Array | None
    behaviour_logp: Array | None
    advantages: Array | None


class Fixed(NamedTuple):
    teacher_head: Array
    student_bias: Array | None
    teacher_bias: Array | None
    tokens: Tokens


class _Head(NamedTuple):
    weight: Array
    bias: Array | None


class _Heads(NamedTuple):
    student: _Head
    teacher: _Head


def _forward(plan: Plan, hidden_BTD: Array, head_VD: Array, fixed: Fixed) -> tuple[Any, ...]:
    """(loss sum, loss of each token, metrics of each token)"""

    def scan(hidden_BTD: Array, heads: _Heads, x: Tokens) -> Any:
        def step(_: None, h_NCD: Array, x_NC: Tokens) -> tuple[None, Any]:
            return None, lax.map(lambda tile: _tile(plan, heads, *tile)[0], (h_NCD, x_NC))

        return _over_chunks(plan, step, None, hidden_BTD, x)[1]

    heads = _prepare_heads(plan, hidden_BTD, head_VD, fixed)
    loss_BT, measured_BT = _on_shards(plan, scan, (("batch",), ("batch",)))(hidden_BTD, heads, fixed.tokens)
    return (loss_BT * fixed.tokens.weight).sum(), loss_BT, measured_BT


def values_and_gradient(
    plan: Plan, hidden_BTD: Array, head_VD: Array, fixed: Fixed
) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
    """What ``_forward`` returns, and the gradient of the loss sum in hidden states and, in float32, head."""

    def scan(hidden_BTD: Array, heads: _Heads, x: Tokens) -> Any:
        def step(dhead_VD: Array, h_NCD: Array, x_NC: Tokens) -> tuple[Array, Any]:
            values, ids, dlogits = lax.map(lambda tile: _tile(plan, heads, *tile, gradient=True), (h_NCD, x_NC))
            dhidden_NCD, dhead_VD = _apply_gradient(plan, heads, h_NCD, ids, dlogits, dhead_VD)
            return dhead_VD, (values, dhidden_NCD)

        dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
        start = jnp.zeros(heads.student.weight.shape, dtype)
        dhead_VD, (values, dhidden_BTD) = _over_chunks(plan, step, start, hidden_BTD, x)
        # The shards' sums meet once, here, not in every step of the scan.
        if plan.vocab_axes:
            dhidden_BTD = lax.psum(dhidden_BTD, plan.vocab_axes)
        if scattered:
            dhead_VD = lax.psum_scatter(dhead_VD, plan.embed_axes, scatter_dimension=1, tiled=True)
        if rest := [a for a in plan.batch_axes if not (scattered and a in plan.embed_axes)]:
            dhead_VD = lax.psum(dhead_VD, rest)
        return values, dhidden_BTD.astype(hidden_BTD.dtype), dhead_VD

    heads = _prepare_heads(plan, hidden_BTD, head_VD, fixed)
    # Each chip gets the sum of its own columns: the whole head gradient is never sent back, or held twice.
    scattered = plan.scatters(head_VD.shape[1])
    run = _on_shards(plan, scan, (("batch",), ("batch",), ("vocab", "embed" if scattered else None)))
    (loss_BT, measured_BT), dhidden_BTD, dhead_VD = run(hidden_BTD, heads, fixed.tokens)
    rows = head_VD.shape[0]
    dhead_VD = jnp.pad(dhead_VD[:rows], [(0, max(0, rows - dhead_VD.shape[0])), (0, 0)])
    dhead_VD = constrain(dhead_VD, _fit(plan.layout, dhead_VD.shape, ("vocab", "embed")), plan.layout)
    return ((loss_BT * fixed.tokens.weight).sum(), loss_BT, measured_BT), (dhidden_BTD, dhead_VD)


def _forward_with_gradient(plan: Plan, hidden_BTD: Array, head_VD: Array, fixed: Fixed) -> Any:
    values, (dhidden_BTD, dhead_VD) = values_and_gradient(plan, hidden_BTD, head_VD, fixed)
    return values, (dhidden_BTD, dhead_VD.astype(head_VD.dtype))


def _backward(plan: Plan, residuals: tuple[Array, Array], cotangents: tuple[Array, Any, Any]) -> tuple[Any, ...]:
    dhidden_BTD, dhead_VD = residuals
    scale = cotangents[0]
    return (dhidden_BTD * scale).astype(dhidden_BTD.dtype), (dhead_VD * scale).astype(dhead_VD.dtype), None


fused_loss = jax.custom_vjp(_forward, nondiff_argnums=(0,))
fused_loss.defvjp(_forward_with_gradient, _backward)


def _tile(plan: Plan, heads: _Heads, h_CD: Array, x: Tokens, *, gradient: bool = False) -> Any:
    """((loss, metrics) of each token, ids, dloss/dproducts on those ids, or on the whole vocabulary if ids is None)."""
    words, readouts = plan.vocabulary(heads), (plan.student_readout, plan.teacher_readout)
    s: Any = _logits(words, readouts[0], h_CD, heads.student) if plan.student_vocabulary else None
    t: Any = _logits(words, readouts[1], x.teacher_hidden, heads.teacher) if plan.teacher_vocabulary else None
    size = max(plan.k, plan.metric_k, plan.lists)
    ids_p: Any = words.top_k(s, size) if plan.student_vocabulary and size else None
    ids_q: Any = words.top_k(t, size) if plan.teacher_vocabulary and size else None
    measured = {}
    if plan.metric_k:
        measured = token_metrics(words, s, t, ids_p, ids_q, x.tokens, plan.metric_k, plan.lists)
    ids: Any = None
    member = None
    if plan.k:
        policy: Any = ids_p if x.topk_ids is None else x.topk_ids
        ids, member = support_ids(plan.objective.support, *jax.tree.map(lambda i: i[:, : plan.k], (policy, ids_q)))
    if plan.sparse:
        s = _logits_at(words, readouts[0], h_CD, heads.student, s, ids)
        t = _logits_at(words, readouts[1], x.teacher_hidden, heads.teacher, t, ids)
    loss, dlogits = _loss(plan, words, s, t, x, ids, member, gradient)
    loss = jnp.where(x.mask, loss, 0)
    if not gradient:
        return (loss, measured), None, None
    products = readouts[0].pull_back(dlogits, s).astype(h_CD.dtype)
    if plan.sparse:
        return (loss, measured), ids, products
    return (loss, measured), None, jnp.pad(products, ((0, 0), (0, heads.student.weight.shape[0] - words.columns)))


def _loss(
    plan: Plan, words: Vocabulary, s: Array, t: Array, x: Tokens, ids: Any, member: Any, gradient: bool
) -> tuple[Array, Any]:
    """Loss of each token from both sides' logits (of the support if sparse), and weight · dloss/ds."""
    o = plan.objective
    if o.temperature != 1:
        s, t = s / o.temperature, t / o.temperature
    if plan.sparse:
        picks_s, picks_t = Picks(support=s), Picks(support=t)
    else:
        picks_s, picks_t = (_picks(plan, words, z, x.tokens, ids, member) for z in (s, t))

    def picked(picks: Picks) -> Array:
        return token_loss(o, picks, picks_t, member, x.behaviour_logp, x.advantages)

    def dense(s: Array, lse: Any) -> Array:
        lse_t: Any = picks_t.lse
        return divergence(s - lse[:, None], t - lse_t[:, None], o).sum(-1)

    terms, loss, ds = [], jnp.zeros(s.shape[:1], s.dtype), jnp.zeros((), s.dtype)
    if o.name == "full":
        part, pull_back = jax.vjp(dense, s, picks_s.lse)
        loss = words.sum(part)
        if gradient:
            ds, dlse = pull_back(x.weight)
            terms.append(Picks(lse=words.sum(dlse)))
    if o.name != "full" or plan.rewarded:
        part, pull_back = jax.vjp(picked, picks_s)
        loss = loss + part
        if gradient:
            terms += pull_back(x.weight)
    if not gradient:
        return loss, None
    if plan.sparse:
        return loss, terms[0].support / o.temperature
    for d in terms:
        ds = ds + _pull_back_picks(words, d, picks_s, s, x.tokens, ids, member)
    return loss, ds / o.temperature


def _picks(plan: Plan, words: Vocabulary, z_CV: Array, tokens: Array, ids: Any, member: Any) -> Picks:
    sampled = plan.objective.name == "sampled" or plan.rewarded
    return Picks(
        support=words.take(z_CV, ids) if plan.k else None,
        token=words.take(z_CV, tokens[:, None])[:, 0] if sampled else None,
        lse=words.logsumexp(z_CV),
        rest=words.logsumexp(_outside(words, z_CV, ids, member)) if plan.objective.tail else None,
    )


def _pull_back_picks(
    words: Vocabulary, d: Picks, picks: Picks, z_CV: Array, tokens: Array, ids: Any, member: Any
) -> Array:
    """dloss/dz from dloss/dpicks: a log-sum-exp passes its part on as probabilities."""
    lse: Any = picks.lse
    dz = (jnp.zeros_like(lse) if d.lse is None else d.lse)[:, None] * jnp.exp(z_CV - lse[:, None])
    if d.token is not None:
        dz = dz + jnp.where(words.ids() == tokens[:, None], d.token[:, None], 0)
    if d.rest is not None:
        rest: Any = picks.rest
        dz = dz + d.rest[:, None] * jnp.exp(_outside(words, z_CV, ids, member) - rest[:, None])
    return dz if d.support is None else words.add_at(dz, ids, d.support)


def _outside(words: Vocabulary, z_CV: Array, ids: Array, member: Array) -> Array:
    # Added, not set: a placeholder may repeat the id of a member.
    return words.add_at(z_CV, ids, jnp.where(member, FILL, 0))


def _apply_gradient(
    plan: Plan, heads: _Heads, h_NCD: Array, ids: Array | None, dlogits: Array, dhead_VD: Array
) -> tuple[Array, Array]:
    """Hidden gradient of a chunk of N tiles, and the head gradient with the chunk's part added."""
    dtype, width, head = dhead_VD.dtype, h_NCD.shape[-1], heads.student
    if ids is not None:
        ids, here = plan.vocabulary(heads).local(ids)
        dlogits = jnp.where(here, dlogits, 0)
        dhidden = jnp.einsum("nck,nckd->ncd", dlogits, head.weight[ids], preferred_element_type=dtype)
        update = dlogits[..., None].astype(dtype) * h_NCD[..., None, :].astype(dtype)
        dhead_VD = dhead_VD.at[ids.reshape(-1)].add(update.reshape(-1, width))
    else:
        dhidden = jnp.einsum("ncv,vd->ncd", dlogits, head.weight, preferred_element_type=dtype)
        dlogits_VC = dlogits.reshape(-1, dlogits.shape[-1]).T
        dlogits_VC = lax.platform_dependent(dlogits_VC, cpu=_row_major, default=lambda x: x)
        update = jnp.einsum("vc,cd->vd", dlogits_VC, h_NCD.reshape(-1, width), preferred_element_type=dtype)
        dhead_VD = dhead_VD + update
    # Parts of a sum over vocabulary shards are not rounded before they meet.
    return dhidden if plan.vocab_axes else dhidden.astype(h_NCD.dtype), dhead_VD


def _row_major(x: Array) -> Array:
    # XLA on CPU folds the transposition into the product, which then is twice as slow as transposing and multiplying.
    return with_layout_constraint(x, MemoryLayout(major_to_minor=tuple(range(x.ndim))))


def _logits(words: Vocabulary, readout: Readout, h_CD: Array, head: _Head) -> Array:
    dtype = jnp.promote_types(h_CD.dtype, jnp.float32)
    products = jnp.einsum("cd,vd->cv", h_CD, head.weight, preferred_element_type=dtype)[:, : words.columns]
    logits = readout(products if head.bias is None else products + head.bias)
    everywhere = math.prod([lax.axis_size(a) for a in words.axes]) * words.columns
    return logits if words.valid == everywhere else words.mask(logits)


def _logits_at(
    words: Vocabulary, readout: Readout, h_CD: Array, head: _Head, logits_CV: Array | None, ids_CK: Array
) -> Array:
    if logits_CV is not None:
        return words.take(logits_CV, ids_CK)
    dtype = jnp.promote_types(h_CD.dtype, jnp.float32)
    rows, here = words.local(ids_CK)
    products = jnp.einsum("cd,ckd->ck", h_CD, head.weight[rows], preferred_element_type=dtype)
    products = products if head.bias is None else products + head.bias[rows]
    return readout(words.sum(jnp.where(here, products, 0)))


def _on_shards(plan: Plan, f: Any, out: tuple[Axes, ...]) -> Any:
    """f(hidden, heads, tokens) on the tokens of each batch shard and the part of the heads of each vocabulary shard."""
    if plan.layout is None or not plan.batch_axes + plan.vocab_axes:
        return f
    batch, vocab, *outputs = (plan.layout.spec(axes) for axes in (("batch",), ("vocab",), *out))
    return jax.shard_map(
        f, mesh=plan.layout.mesh, in_specs=(batch, vocab, batch), out_specs=tuple(outputs), check_vma=False
    )


def _prepare_heads(plan: Plan, hidden_BTD: Array, head_VD: Array, fixed: Fixed) -> _Heads:
    """Both heads cast for the products, and only then gathered over fsdp; shards of equal ids for both sides."""
    rows = min(head_VD.shape[0], fixed.teacher_head.shape[0])
    shards = math.prod(plan.layout.mesh.shape[a] for a in plan.vocab_axes) if plan.layout else 1

    def prepare(x: Array | None, dtype: Any) -> Any:
        if x is None:
            return None
        x = x.astype(dtype)
        # Without shards, logits are cut instead: cutting here would copy the wider head.
        if shards > 1 or x.ndim == 1:
            x = jnp.pad(x[:rows], [(0, -rows % shards)] + [(0, 0)] * (x.ndim - 1))
        return constrain(x, ("vocab", *[None] * (x.ndim - 1)), plan.layout)

    dtypes = hidden_BTD.dtype, fixed.tokens.teacher_hidden.dtype
    weights = (prepare(w, t) for w, t in zip((head_VD, fixed.teacher_head), dtypes, strict=True))
    biases = (
        prepare(b, jnp.promote_types(t, jnp.float32))
        for b, t in zip((fixed.student_bias, fixed.teacher_bias), dtypes, strict=True)
    )
    return _Heads(*map(_Head, weights, biases))


def _over_chunks(plan: Plan, step: Any, carry: Any, hidden_BTD: Array, x: Tokens) -> tuple[Any, Any]:
    """``step(carry, [N, C, ...] hidden states and tokens) → (carry, [N, C, ...])`` over chunks of N tiles of C tokens.

    Only tokens under the mask are gathered: prompts and padding cost nothing, and whatever stands there, NaN and ids
    out of range included, meets no product. Returns the last carry and what the steps made, [B, T, ...], 0 elsewhere.
    """
    shape, tokens = x.tokens.shape, x.tokens.size
    tile = min(plan.tile, tokens)
    # A head gradient on k rows a token is added in place: larger chunks would only gather more rows at once.
    chunks = -(-tokens // (tile if plan.sparse else max(plan.chunk, tile)))
    per_chunk = -(-tokens // (chunks * tile))
    size = per_chunk * tile
    used = jnp.flatnonzero(x.mask, size=chunks * size, fill_value=tokens)
    used = jnp.where(used < tokens, used, tokens + jnp.arange(chunks * size))  # none twice, as the writes promise
    flat = jax.tree.map(lambda a: a.reshape(tokens, *a.shape[2:]), (hidden_BTD, x))

    def gather(i: Array) -> tuple[Array, Any]:
        ids = lax.dynamic_slice_in_dim(used, i * size, size)
        chunk = jax.tree.map(lambda a: a.at[ids].get(mode="fill", fill_value=0), flat)
        return ids, jax.tree.map(lambda a: a.reshape(per_chunk, tile, *a.shape[1:]), chunk)

    def body(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        ids, chunk = gather(i)
        carry, made = step(state[0], *chunk)

        def put(to: Array, a: Array) -> Array:
            return to.at[ids].set(a.reshape(size, *a.shape[2:]), mode="drop", unique_indices=True)

        return carry, jax.tree.map(put, state[1], made)

    made = jax.eval_shape(lambda: step(carry, *gather(jnp.int32(0))[1])[1])
    zeros = jax.tree.map(lambda a: jnp.zeros((tokens, *a.shape[2:]), a.dtype), made)
    count = -(-x.mask.sum() // size)
    if plan.batch_axes:  # all shards take as many steps: sums over the vocabulary meet in each
        count = lax.pmax(count, plan.batch_axes)
    carry, made = lax.fori_loop(0, count, body, (carry, zeros))
    return carry, jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), made)


def _fit(layout: Layout | None, shape: tuple[int, ...], axes: Axes) -> Axes:
    """The axes without those whose mesh size does not divide the dimension: |V| is a multiple of nothing."""
    if layout is None:
        return axes
    table = dict(layout.table)
    ways = [math.prod(layout.mesh.shape[a] for a in table.get(name, ())) if name else 1 for name in axes]
    return tuple(None if size % n else name for size, n, name in zip(shape, ways, axes, strict=True))
