"""The jitted update: gradient of a loss sum over micro-batches, one global division, one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from opd_jax.mesh import Layout
from opd_jax.training.state import TrainState
from opd_jax.types import Metrics, Params

LossFn = Callable[..., tuple[tuple[Array, Array], Metrics]]


def global_gradient(
    loss_fn: LossFn, params: Params, *batch: Any, frozen: Any = None, micro_batch: int | None = None
) -> tuple[Params, Array, Metrics]:
    """∇ (Σ loss / Σ tokens) over the whole batch, accumulated in float32 over micro-batches of ``micro_batch`` rows.

    The loss is one global sum over one global count, so the result does not depend on the split.

    Args:
        loss_fn: ``(params, *batch[, frozen]) → ((loss sum, count), metrics)``.
        batch: pytrees whose arrays all start with the row axis.
        frozen: passed whole to every micro-batch (a teacher's head).

    Returns:
        gradient, loss (nats per token), metrics.
    """
    extra = () if frozen is None else (frozen,)

    def sums(params: Params, *rows: Any) -> tuple[Array, tuple[Array, Metrics]]:
        (loss, count), metrics = loss_fn(params, *rows, *extra)
        return loss, (count, metrics)

    gradient = jax.value_and_grad(sums, has_aux=True)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if micro_batch is None or micro_batch == rows:
        (loss, (count, metrics)), grads = gradient(params, *batch)
    else:

        def split(x: Array) -> Array:
            # strided rows, so that every device contributes to every micro-batch
            return x.reshape(micro_batch, rows // micro_batch, *x.shape[1:]).swapaxes(0, 1)

        def body(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        parts = jax.tree.map(split, batch)
        first = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        ((loss, (count, metrics)), grads), _ = jax.lax.scan(body, zeros, parts)
    count = jnp.maximum(count, 1)
    return jax.tree.map(lambda g: g / count, grads), loss / count, metrics


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    layout: Layout | None = None,
    micro_batch: int | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the jitted ``update(state, *batch, frozen=None) → (state, metrics)``; the state is donated.

    ``shardings`` (``state_shardings``) and ``layout`` keep the state where it lies on a mesh; one device needs neither.
    A step whose loss or gradient is not finite changes no weight and is counted in ``state.skipped``.
    """

    def update(state: TrainState, *batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        grads, loss, metrics = global_gradient(loss_fn, state.params, *batch, frozen=frozen, micro_batch=micro_batch)
        norm = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        one = jnp.ones(())
        metrics = metrics | {"loss": (loss, one), "gradient_norm": (norm, one)}
        state = TrainState(state.step + 1, state.skipped + ~finite, params, opt_state)
        return state, metrics

    metric_sharding = layout.sharding() if layout else None
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, metric_sharding))
