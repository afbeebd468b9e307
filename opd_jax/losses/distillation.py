"""The public face of the losses: what users call, what it checks, and how it is laid out for ``fused``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from opd_jax.config import Objective
from opd_jax.errors import InputError
from opd_jax.losses.fused import Fixed, Plan, Tokens, fused_loss, values_and_gradient
from opd_jax.losses.metrics import reduce_metrics
from opd_jax.losses.vocabulary import Readout
from opd_jax.mesh import Layout
from opd_jax.types import Metrics

# Tokens a chunk, tokens a tile. CPU: a tile's logits stay in cache. TPU: memory. GPU: products large enough for peak.
_SIZES = {"cpu": (256, 64), "tpu": (512, 256), "gpu": (4096, 1024)}


def distillation_loss(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    objective: Objective,
    *,
    metrics: bool = True,
    metric_k: int = 16,
    bins: int = 16,
    depth: Int[Array, "B T"] | None = None,
    steps: int | None = None,
    **optional: Any,
) -> tuple[tuple[Array, Array], Metrics]:
    """The distillation loss Σ_t w_t · loss_t, the token count Σ_t w_t, and the metrics (paper §2, Eqs. 3-10).

    The hidden state at t predicts ``tokens[:, t]``; logits are hidden · headᵀ. w is the mask, times ``weights``. Only
    the student's hidden states and head receive a gradient, the head's accumulated in float32 and returned in its own
    dtype (``distillation_gradient`` returns it in float32). The caller divides the sums of all micro-batches once:
    loss = Σ loss_sum / Σ count, in nats a token.

    Args:
        student_head_VD: master weights; cast to the dtype of the hidden states for the products, as is the teacher's.
        mask_BT: true (or 1) on response tokens; what stands elsewhere has no influence.
        metrics: with them come Eqs. 6-10 and their kin from the same logits, each as (sum, count); else {}.
        metric_k: size of the top-k lists of the metrics, whatever the objective.
        bins: entries of the curves over output position.
        depth: output position of each token, below ``steps``; None: its column t, of T.
        optional: the further arguments of ``token_losses``, and
            ``weights`` [B, T]: weights of positions (``position_weights``); the metrics are not weighted.

    Raises:
        InputError: shapes that do not fit each other, the vocabulary or the mesh.
    """
    arrays = (student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    plan, hidden, head, fixed = _prepare(*arrays, objective, metric_k if metrics else 0, **optional)
    loss, _, values_BT = fused_loss(plan, hidden, head, fixed)
    return (loss, fixed.tokens.weight.sum()), reduce_metrics(values_BT, fixed.tokens.mask, bins, depth, steps)


def distillation_gradient(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    objective: Objective,
    *,
    metrics: bool = True,
    metric_k: int = 16,
    bins: int = 16,
    depth: Int[Array, "B T"] | None = None,
    steps: int | None = None,
    **optional: Any,
) -> tuple[tuple[Array, Array], Metrics, tuple[Array, Array]]:
    """What ``distillation_loss`` returns, and the gradient of its loss sum in hidden states and head.

    The head's is float32 even where the head is not, which a derivative by JAX could not be.
    """
    arrays = (student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    plan, hidden, head, fixed = _prepare(*arrays, objective, metric_k if metrics else 0, **optional)
    (loss, _, values_BT), gradient = values_and_gradient(plan, hidden, head, fixed)
    return (loss, fixed.tokens.weight.sum()), reduce_metrics(values_BT, fixed.tokens.mask, bins, depth, steps), gradient


def token_losses(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    objective: Objective,
    **optional: Any,
) -> Float[Array, "B T"]:
    """The loss of each position (0 under the mask): the terms of ``distillation_loss``, without gradient.

    Args:
        vocab_size: size of the tokenizer; ids from there on carry no probability. None: the narrower head.
        topk_ids: [B, T, K] the sampling policy's most probable ids, first one first; they then are the student's S_p.
        behaviour_logp: [B, T] log-probabilities of the tokens under the policy that sampled them, for ``correction``.
        advantages: [B, T] of a task reward; their policy-gradient loss, -advantage · log p(y), is added to any
            objective (to the advantage log q/p itself if sampled), corrected alike.
        student_readout, teacher_readout: a ``Readout`` where logits are not simply hidden · headᵀ.
        chunk: tokens (of one batch shard) between two accumulations into the head gradient. None: by platform.
        tile: tokens whose logits exist at once. None: by platform.
        layout: the mesh; sequences are then sharded over its ``batch`` axes, and chunks stay within a shard; logits
            over its ``vocab`` axes, and only sums over the vocabulary and lists of k ids pass between those.
    """
    arrays = (student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    plan, hidden, head, fixed = _prepare(*arrays, objective, 0, **optional)
    return lax.stop_gradient(fused_loss(plan, hidden, head, fixed)[1])


def position_metrics(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    *,
    k: int = 16,
    lists: int = 0,
    **optional: Any,
) -> dict[str, Array]:
    """The metrics of Eqs. 6-10 at each position [B, T], without gradient: the terms that ``distillation_loss`` sums.

    What stands under the mask is meaningless; ``overlap_advantage`` has no value where ``overlap_ratio`` is 0.

    Args:
        lists: with it come ``logp`` and ``logq`` of the token that stands there, nats, and ``student_top_ids``,
            ``student_top_logp``, ``teacher_top_ids``, ``teacher_top_logp`` [B, T, lists]: the most probable ids of
            each side, most probable first.
    """
    arrays = (student_hidden_BTD, student_head_VD, teacher_hidden_BTE, teacher_head_VE, tokens_BT, mask_BT)
    plan, hidden, head, fixed = _prepare(*arrays, Objective(), k, **optional)
    plan = dataclasses.replace(plan, lists=min(lists, plan.vocab))
    return lax.stop_gradient(fused_loss(plan, hidden, head, fixed)[2])


def _prepare(
    hidden_BTD: Array,
    head_VD: Array,
    teacher_hidden_BTE: Array,
    teacher_head_VE: Array,
    tokens_BT: Array,
    mask_BT: Array,
    objective: Objective,
    metric_k: int,
    *,
    vocab_size: int | None = None,
    topk_ids: Array | None = None,
    behaviour_logp: Array | None = None,
    advantages: Array | None = None,
    weights: Array | None = None,
    student_readout: Readout = Readout(),  # noqa: B008 (frozen)
    teacher_readout: Readout = Readout(),  # noqa: B008
    chunk: int | None = None,
    tile: int | None = None,
    layout: Layout | None = None,
) -> tuple[Plan, Array, Array, Fixed]:
    """The static plan, what is differentiated, and what is not."""
    platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
    default_chunk, default_tile = _SIZES.get(platform, _SIZES["gpu"])
    width = min(head_VD.shape[0], teacher_head_VE.shape[0])
    plan = Plan(
        objective,
        vocab_size or width,
        topk_ids is not None,
        advantages is not None,
        chunk or default_chunk,
        tile or default_tile,
        layout,
        min(metric_k, vocab_size or width),
        dataclasses.replace(student_readout, bias=None),
        dataclasses.replace(teacher_readout, bias=None),
    )
    for what, array in {"mask": mask_BT, "weights": weights}.items():
        _check_shape(what, array, tokens_BT.shape)
    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    mask_BT = mask_BT.astype(bool)
    weight_BT = mask_BT.astype(dtype) if weights is None else jnp.where(mask_BT, weights, 0).astype(dtype)
    per_token = Tokens(teacher_hidden_BTE, tokens_BT, mask_BT, weight_BT, topk_ids, behaviour_logp, advantages)
    fixed = Fixed(teacher_head_VE, student_readout.bias, teacher_readout.bias, per_token)
    _check(plan, vocab_size, hidden_BTD, head_VD, fixed)
    return plan, hidden_BTD, head_VD, lax.stop_gradient(fixed)


def _check(plan: Plan, vocab_size: int | None, hidden_BTD: Array, head_VD: Array, fixed: Fixed) -> None:
    x, objective = fixed.tokens, plan.objective
    widths = head_VD.shape[0], fixed.teacher_head.shape[0]
    if vocab_size is not None and vocab_size > min(widths):
        raise InputError(
            f"vocab_size = {vocab_size}, but the heads have {widths[0]} (student) and {widths[1]} (teacher) rows: both "
            "must cover the tokenizer. Use a teacher with the student's tokenizer."
        )
    if x.topk_ids is not None and x.topk_ids.shape[-1] < plan.k:
        raise InputError(
            f"topk_ids holds {x.topk_ids.shape[-1]} ids a token, objective.k is {objective.k}: "
            "let the rollout return at least objective.k ids."
        )
    if objective.correction != "none" and x.behaviour_logp is None:
        raise InputError(f"objective.correction={objective.correction} needs behaviour_logp, the rollouts' log-probs.")
    if objective.correction != "none" and objective.name != "sampled" and x.advantages is None:
        raise InputError(
            f"objective.correction={objective.correction} weights a policy gradient, which name={objective.name} has "
            "none of without advantages. Set objective.name=sampled, or correction=none."
        )
    shape = x.tokens.shape
    sides = ("student", hidden_BTD, head_VD), ("teacher", x.teacher_hidden, fixed.teacher_head)
    for what, hidden, head in sides:
        if hidden.shape != (*shape, head.shape[1]):
            raise InputError(
                f"{what} hidden states have shape {hidden.shape}, expected {(*shape, head.shape[1])}: "
                f"[B, T] of the tokens and the width of the {what}'s head {head.shape}."
            )
    for what, array in {"behaviour_logp": x.behaviour_logp, "advantages": x.advantages}.items():
        _check_shape(what, array, shape)
    for what, bias, rows in zip(("student", "teacher"), (fixed.student_bias, fixed.teacher_bias), widths, strict=True):
        if bias is not None and bias.shape != (rows,):
            raise InputError(f"bias of {what}_readout has shape {bias.shape}, expected {(rows,)}, one a head row.")
    if plan.layout is not None:
        plan.layout.check("tokens", shape, ("batch", None))


def _check_shape(what: str, array: Array | None, shape: tuple[int, ...]) -> None:
    if array is not None and array.shape != shape:
        raise InputError(f"{what} has shape {array.shape}, expected that of the tokens, {shape}.")
