"""The objectives from hidden states and head weights, without logits for all tokens at once.

The gradient is formed in the forward pass, so that no product with the vocabulary is done twice. Tokens pass in two
levels: tiles, so small that the many elementwise passes over their logits stay in cache, and chunks of tiles, so large
that the [V, D] head gradient is read and written rarely. In between stands dloss/dlogits of one chunk, in the dtype of
the hidden states.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jaxtyping import Float, Int

from opd_jax.config import Objective
from opd_jax.errors import InputError
from opd_jax.losses.metrics import reduce_metrics, token_metrics
from opd_jax.losses.reference import FILL, divergence, score_function
from opd_jax.losses.supports import add_at, partial_loss, renormalised_loss, support_ids, top_k
from opd_jax.mesh import Axes, Layout, constrain
from opd_jax.types import Metrics


def distillation_loss(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    topk_ids: Int[Array, "B T K"] | None = None,
    metrics: bool = True,
    metric_k: int = 16,
    bins: int = 16,
    chunk: int = 512,
    tile: int | None = None,
    layout: Layout | None = None,
) -> tuple[tuple[Array, Array], Metrics]:
    """The distillation loss Σ_t mask_t · loss_t, the token count Σ_t mask_t, and the metrics (paper §2, Eqs. 3-10).

    The hidden state at t predicts ``tokens[:, t]``; logits are hidden · headᵀ. Only the student's hidden states and
    head receive a gradient, the head's accumulated in float32 and returned in its own dtype. The caller divides the
    sums of all micro-batches once: loss = Σ loss_sum / Σ count, in nats a token.

    Args:
        student_head_VD: master weights; cast to the dtype of the hidden states for the products, as is the teacher's.
        mask_BT: true (or 1) on response tokens; what stands elsewhere has no influence.
        vocab_size: size of the tokenizer; ids from there on carry no probability. None: the narrower head.
        topk_ids: the sampling policy's most probable ids, first one first; they then are the student's support S_p.
        metrics: with them come Eqs. 6-10 and their kin from the same logits, each as (sum, count); else {}.
        metric_k: size of the top-k lists of the metrics, whatever the objective.
        bins: entries of the curves over output position.
        chunk: tokens (of one batch shard) between two accumulations into the head gradient.
        tile: tokens whose logits exist at once; None: 32 on CPU (cache), 256 elsewhere.
        layout: the mesh; sequences are then sharded over its ``batch`` axes and chunks stay within a shard.

    Raises:
        InputError: shapes that do not fit each other, the vocabulary or the mesh.
    """
    plan = _plan(student_head_VD, teacher_head_VE, objective, vocab_size, topk_ids, chunk, tile, layout)
    plan = dataclasses.replace(plan, metric_k=min(metric_k, plan.vocab) if metrics else 0)
    _check(plan, student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    mask_BT = mask_BT.astype(bool)
    fixed = lax.stop_gradient((teacher_head_VE, _Tokens(teacher_hidden_BTE, tokens_BT, mask_BT, topk_ids)))
    loss, _, values_BT = _fused(plan, student_hidden_BTD, student_head_VD, *fixed)
    return (loss, mask_BT.sum(dtype=loss.dtype)), reduce_metrics(lax.stop_gradient(values_BT), mask_BT, bins)


def token_losses(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    topk_ids: Int[Array, "B T K"] | None = None,
    chunk: int = 512,
    tile: int | None = None,
    layout: Layout | None = None,
) -> Float[Array, "B T"]:
    """The loss of each position (0 under the mask): the terms of ``distillation_loss``, without gradient."""
    plan = _plan(student_head_VD, teacher_head_VE, objective, vocab_size, topk_ids, chunk, tile, layout)
    _check(plan, student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    x = _Tokens(teacher_hidden_BTE, tokens_BT, mask_BT.astype(bool), topk_ids)
    return lax.stop_gradient(_fused(plan, student_hidden_BTD, student_head_VD, teacher_head_VE, x)[1])


def position_metrics(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    *,
    k: int = 16,
    vocab_size: int | None = None,
    layout: Layout | None = None,
) -> dict[str, Float[Array, "B T"]]:
    """The metrics of Eqs. 6-10 at each position, without gradient: the terms that ``distillation_loss`` sums.

    What stands under the mask is meaningless; ``overlap_advantage`` has no value where ``overlap_ratio`` is 0.
    """
    plan = _plan(student_head_VD, teacher_head_VE, Objective(), vocab_size, None, 512, None, layout)
    plan = dataclasses.replace(plan, metric_k=min(k, plan.vocab))
    _check(plan, student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    x = _Tokens(teacher_hidden_BTE, tokens_BT, mask_BT.astype(bool), None)
    return lax.stop_gradient(_fused(plan, student_hidden_BTD, student_head_VD, teacher_head_VE, x)[2])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static: the objective, the sizes, and which products with the whole vocabulary are needed."""

    objective: Objective
    vocab: int  # valid ids
    given_ids: bool
    chunk: int
    tile: int
    layout: Layout | None
    metric_k: int = 0  # 0: no metrics

    @property
    def sparse(self) -> bool:
        """Renormalised top-k: loss and gradient live on the logits of the support."""
        return self.objective.name == "topk" and self.objective.normalise and not self.objective.tail

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
        """None where there is one batch shard: XLA cannot compile a psum over axes of size 1 beside a tensor axis."""
        axes = dict(self.layout.table)["batch"] if self.layout else ()
        return axes if self.layout and math.prod(self.layout.mesh.shape[a] for a in axes) > 1 else ()


class _Tokens(NamedTuple):
    """What stands at each token and carries no gradient: [B, T, ...], or [C, ...] in a tile."""

    teacher_hidden: Array
    tokens: Array
    mask: Array
    topk_ids: Array | None


class _Heads(NamedTuple):
    student: Array
    teacher: Array


def _forward(plan: _Plan, hidden_BTD: Array, head_VD: Array, teacher_head_VE: Array, x: _Tokens) -> tuple[Any, ...]:
    """(loss sum, loss of each token, metrics of each token)"""

    def scan(hidden_BTD: Array, heads: _Heads, x: _Tokens) -> Any:
        def step(_: None, chunk: Any) -> tuple[None, Any]:
            return None, lax.map(lambda tile: _tile(plan, heads, *tile)[0], chunk)

        _, values = lax.scan(step, None, _split(plan, hidden_BTD, x))
        return jax.tree.map(lambda v: _join(v, x.tokens.shape), values)

    heads = _prepare_heads(plan, hidden_BTD, head_VD, teacher_head_VE, x)
    loss_BT, measured_BT = _on_shards(plan, scan, (("batch",), ("batch",)))(hidden_BTD, heads, x)
    return loss_BT.sum(), loss_BT, measured_BT


def _forward_with_gradient(
    plan: _Plan, hidden_BTD: Array, head_VD: Array, teacher_head_VE: Array, x: _Tokens
) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
    def scan(hidden_BTD: Array, heads: _Heads, x: _Tokens) -> Any:
        def step(dhead_VD: Array, chunk: tuple[Array, _Tokens]) -> tuple[Array, Any]:
            values, ids, dlogits = lax.map(lambda tile: _tile(plan, heads, *tile, gradient=True), chunk)
            dhidden, dhead_VD = _apply_gradient(heads.student, chunk[0], ids, dlogits, dhead_VD)
            return dhead_VD, (values, dhidden)

        start = jnp.zeros(heads.student.shape, jnp.promote_types(hidden_BTD.dtype, jnp.float32))
        dhead_VD, per_token = lax.scan(step, start, _split(plan, hidden_BTD, x))
        values, dhidden_BTD = jax.tree.map(lambda v: _join(v, x.tokens.shape), per_token)
        # The shards' sums meet once, here, not in every step of the scan.
        return values, dhidden_BTD, lax.psum(dhead_VD, plan.batch_axes)

    heads = _prepare_heads(plan, hidden_BTD, head_VD, teacher_head_VE, x)
    run = _on_shards(plan, scan, (("batch",), ("batch",), ()))
    (loss_BT, measured_BT), dhidden_BTD, dhead_VD = run(hidden_BTD, heads, x)
    dhead_VD = jnp.pad(dhead_VD, [(0, head_VD.shape[0] - dhead_VD.shape[0]), (0, 0)]).astype(head_VD.dtype)
    dhead_VD = constrain(dhead_VD, _fit(plan.layout, dhead_VD.shape, ("vocab", "embed")), plan.layout)
    return (loss_BT.sum(), loss_BT, measured_BT), (dhidden_BTD, dhead_VD)


def _backward(plan: _Plan, residuals: tuple[Array, Array], cotangents: tuple[Array, Any, Any]) -> tuple[Any, ...]:
    dhidden_BTD, dhead_VD = residuals
    scale = cotangents[0]
    return (dhidden_BTD * scale).astype(dhidden_BTD.dtype), (dhead_VD * scale).astype(dhead_VD.dtype), None, None


_fused = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_fused.defvjp(_forward_with_gradient, _backward)


def _tile(plan: _Plan, heads: _Heads, h_CD: Array, x: _Tokens, *, gradient: bool = False) -> Any:
    """((loss, metrics) of each token, ids, dloss/dlogits on those ids, or on the whole vocabulary if ids is None)."""
    s: Any = _logits(plan, h_CD, heads.student) if plan.student_vocabulary else None
    t: Any = _logits(plan, x.teacher_hidden, heads.teacher) if plan.teacher_vocabulary else None
    size = max(plan.k, plan.metric_k)
    ids_p: Any = top_k(s, size) if plan.student_vocabulary and size else None
    ids_q: Any = top_k(t, size) if plan.teacher_vocabulary and size else None
    measured = {}
    if plan.metric_k:
        measured = token_metrics(s, t, ids_p[:, : plan.metric_k], ids_q[:, : plan.metric_k])
    ids: Any = None
    member = None
    if plan.k:
        policy: Any = ids_p if x.topk_ids is None else x.topk_ids
        ids, member = support_ids(plan.objective.support, *jax.tree.map(lambda i: i[:, : plan.k], (policy, ids_q)))
    if plan.sparse:
        s, t = _logits_at(h_CD, heads.student, s, ids), _logits_at(x.teacher_hidden, heads.teacher, t, ids)
    loss_of = functools.partial(_token_loss, plan, t=t, tokens=x.tokens, ids=ids, member=member)
    if not gradient:
        return (jnp.where(x.mask, loss_of(s), 0), measured), None, None
    loss, vjp = jax.vjp(loss_of, s)
    (dlogits,) = vjp(x.mask.astype(loss.dtype))
    return (jnp.where(x.mask, loss, 0), measured), ids if plan.sparse else None, dlogits.astype(h_CD.dtype)


def _token_loss(plan: _Plan, s: Array, *, t: Array, tokens: Array, ids: Any, member: Any) -> Array:
    """Loss of each token from the student's logits: those of the support if sparse, else of the vocabulary."""
    objective = plan.objective
    if objective.temperature != 1:
        s, t = s / objective.temperature, t / objective.temperature
    if plan.sparse:
        return renormalised_loss(s, t, member, objective)
    if plan.k:
        return partial_loss(s, t, ids, member, objective)
    logp, logq = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    if objective.name == "full":
        return divergence(logp, logq, objective).sum(-1)
    logp, logq = (jnp.take_along_axis(x, tokens[:, None], -1)[:, 0] for x in (logp, logq))
    return score_function(logp, logp - logq)


def _apply_gradient(
    head_VD: Array, h_NCD: Array, ids: Array | None, dlogits: Array, dhead_VD: Array
) -> tuple[Array, Array]:
    """Hidden gradient of a chunk of N tiles, and the head gradient with the chunk's part added."""
    dtype, width = dhead_VD.dtype, h_NCD.shape[-1]
    if ids is not None:
        dhidden = jnp.einsum("nck,nckd->ncd", dlogits, head_VD[ids], preferred_element_type=dtype)
        update = dlogits[..., None].astype(dtype) * h_NCD[..., None, :].astype(dtype)
        return dhidden.astype(h_NCD.dtype), add_at(dhead_VD, ids.reshape(-1), update.reshape(-1, width))
    dhidden = jnp.einsum("ncv,vd->ncd", dlogits, head_VD, preferred_element_type=dtype)
    dlogits_VC = dlogits.reshape(-1, dlogits.shape[-1]).T
    dlogits_VC = lax.platform_dependent(dlogits_VC, cpu=_row_major, default=lambda x: x)
    update = jnp.einsum("vc,cd->vd", dlogits_VC, h_NCD.reshape(-1, width), preferred_element_type=dtype)
    return dhidden.astype(h_NCD.dtype), dhead_VD + update


def _row_major(x: Array) -> Array:
    # XLA on CPU folds the transposition into the product, which then is twice as slow as transposing and multiplying.
    return with_layout_constraint(x, MemoryLayout(major_to_minor=tuple(range(x.ndim))))


def _logits(plan: _Plan, h_CD: Array, head_VD: Array) -> Array:
    dtype = jnp.promote_types(h_CD.dtype, jnp.float32)
    logits = jnp.einsum("cd,vd->cv", h_CD, head_VD, preferred_element_type=dtype)
    if plan.vocab == head_VD.shape[0]:
        return logits
    return jnp.where(jnp.arange(head_VD.shape[0]) < plan.vocab, logits, FILL)


def _logits_at(h_CD: Array, head_VD: Array, logits_CV: Array | None, ids_CK: Array) -> Array:
    if logits_CV is not None:
        return jnp.take_along_axis(logits_CV, ids_CK, -1)
    dtype = jnp.promote_types(h_CD.dtype, jnp.float32)
    return jnp.einsum("cd,ckd->ck", h_CD, head_VD[ids_CK], preferred_element_type=dtype)


def _on_shards(plan: _Plan, f: Any, out: tuple[Axes, ...]) -> Any:
    """f(hidden, heads, tokens) on the tokens of each batch shard; the tensor axis stays with the compiler."""
    if plan.layout is None or not plan.batch_axes:
        return f
    batch, whole, *outputs = (plan.layout.spec(axes) for axes in (("batch",), (), *out))
    return jax.shard_map(
        f,
        mesh=plan.layout.mesh,
        in_specs=(batch, whole, batch),
        out_specs=tuple(outputs),
        axis_names=set(plan.batch_axes),
        check_vma=False,
    )


def _prepare_heads(plan: _Plan, hidden_BTD: Array, head_VD: Array, teacher_head_VE: Array, x: _Tokens) -> _Heads:
    """Both heads cut to the narrower, cast for the products, and only then gathered over fsdp."""
    rows = min(head_VD.shape[0], teacher_head_VE.shape[0])
    heads = head_VD[:rows].astype(hidden_BTD.dtype), teacher_head_VE[:rows].astype(x.teacher_hidden.dtype)
    return _Heads(*(constrain(w, _fit(plan.layout, w.shape, ("vocab", None)), plan.layout) for w in heads))


def _split(plan: _Plan, hidden_BTD: Array, x: _Tokens) -> tuple[Array, _Tokens]:
    """[B, T, ...] → [chunk, tile, C, ...], padded with masked tokens."""
    tokens = x.tokens.size
    tile = min(plan.tile, tokens)
    chunks = -(-tokens // max(plan.chunk, tile))
    per_chunk = -(-tokens // (chunks * tile))
    padding = chunks * per_chunk * tile - tokens

    def split(a: Array) -> Array:
        tail = a.shape[2:]
        # Whatever stands under the mask, NaN and ids out of range included, is replaced before it meets a product.
        a = jnp.where(x.mask.reshape(*x.mask.shape, *[1] * len(tail)), a, jnp.zeros_like(a)).reshape(tokens, *tail)
        return jnp.pad(a, [(0, padding)] + [(0, 0)] * len(tail)).reshape(chunks, per_chunk, tile, *tail)

    return jax.tree.map(split, (hidden_BTD, x))


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """[chunk, tile, C, ...] → [B, T, ...]: undoes ``_split``."""
    x = x.reshape(-1, *x.shape[3:])
    return x[: math.prod(shape)].reshape(*shape, *x.shape[1:])


def _fit(layout: Layout | None, shape: tuple[int, ...], axes: Axes) -> Axes:
    """The axes without those whose mesh size does not divide the dimension: |V| is a multiple of nothing."""
    if layout is None:
        return axes
    table = dict(layout.table)
    ways = [math.prod(layout.mesh.shape[a] for a in table.get(name, ())) if name else 1 for name in axes]
    return tuple(None if size % n else name for size, n, name in zip(shape, ways, axes, strict=True))


def _plan(
    head_VD: Array,
    teacher_head_VE: Array,
    objective: Objective,
    vocab_size: int | None,
    topk_ids: Array | None,
    chunk: int,
    tile: int | None,
    layout: Layout | None,
) -> _Plan:
    width = min(head_VD.shape[0], teacher_head_VE.shape[0])
    if vocab_size is not None and vocab_size > width:
        raise InputError(
            f"vocab_size = {vocab_size}, but the heads have {head_VD.shape[0]} (student) and "
            f"{teacher_head_VE.shape[0]} (teacher) rows: both must cover the "
            "tokenizer. Use a teacher with the student's tokenizer."
        )
    if (
        topk_ids is not None
        and objective.name.startswith("topk")
        and topk_ids.shape[-1] < min(objective.k, vocab_size or width)
    ):
        raise InputError(
            f"topk_ids holds {topk_ids.shape[-1]} ids a token, objective.k is {objective.k}: "
            "let the rollout return at least objective.k ids."
        )
    if tile is None:
        platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
        tile = 32 if platform == "cpu" else 256
    return _Plan(objective, vocab_size or width, topk_ids is not None, chunk, tile, layout)


def _check(plan: _Plan, h_BTD: Array, head_VD: Array, t_BTE: Array, head_VE: Array, tokens: Array, mask: Array) -> None:
    for what, hidden, head in (("student", h_BTD, head_VD), ("teacher", t_BTE, head_VE)):
        if hidden.shape != (*tokens.shape, head.shape[1]):
            raise InputError(
                f"{what} hidden states have shape {hidden.shape}, expected {(*tokens.shape, head.shape[1])}: "
                f"[B, T] of the tokens and the width of the {what}'s head {head.shape}."
            )
    if mask.shape != tokens.shape:
        raise InputError(f"mask has shape {mask.shape}, expected that of the tokens, {tokens.shape}.")
    if plan.layout is not None:
        plan.layout.check("tokens", tokens.shape, ("batch", None))
