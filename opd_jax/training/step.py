"""The jitted update: gradient of a loss sum over passes, one global division, one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from opd_jax.mesh import Layout
from opd_jax.sampling.packing import over_passes
from opd_jax.training.state import TrainState
from opd_jax.types import Metrics, Params

LossFn = Callable[..., tuple[tuple[Array, Array], Metrics]]


def global_gradient(
    loss_fn: LossFn,
    params: Params,
    rows: Any,
    *batch: Any,
    frozen: Any = None,
    micro_batch: int | None = None,
    layout: Layout | None = None,
) -> tuple[Params, Array, Metrics]:
    """∇ (Σ loss / Σ tokens) over the whole batch, accumulated in float32 over passes of ``micro_batch`` rows.

    The loss is one global sum over one global count, so the result does not depend on the split. Passes whose rows hold
    no sequence do not run.

    Args:
        loss_fn: ``(params, rows, *batch[, frozen]) → ((loss sum, count), metrics)``.
        rows: ``Sequences``; without ``micro_batch`` any pytree.
        batch: further pytrees whose arrays all start with the row axis.
        frozen: passed whole to every pass (a teacher's head).

    Returns:
        gradient, loss (nats per token), metrics.
    """
    extra = () if frozen is None else (frozen,)

    def sums(params: Params, *part: Any) -> tuple[Array, tuple[Array, Metrics]]:
        (loss, count), metrics = loss_fn(params, *part, *extra)
        return loss, (count, metrics)

    gradient = jax.value_and_grad(sums, has_aux=True)
    if micro_batch is None:
        (loss, (count, metrics)), grads = gradient(params, rows, *batch)
    else:

        def add(total: Any, _: Any, *part: Any) -> Any:
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradient(params, *part))

        first = jax.tree.map(lambda x: x[:micro_batch], (rows, *batch))
        zeros = jax.tree.map(_zeros, jax.eval_shape(gradient, params, *first))
        total = over_passes(add, zeros, rows, *batch, micro_batch=micro_batch, layout=layout)
        (loss, (count, metrics)), grads = total
    count = jnp.maximum(count, 1)
    return jax.tree.map(lambda g: g / count, grads), loss / count, metrics


def _zeros(x: Any) -> Array:
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    layout: Layout | None = None,
    micro_batch: int | None = None,
    follow: tuple[float, int] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the jitted ``update(state, rows, *batch, frozen=None) → (state, metrics)``; the state is donated.

    ``follow`` (decay, every): after every ``every``-th update ``state.moving`` becomes decay · moving + (1 − decay) ·
    weights.

    ``shardings`` (``state_shardings``) and ``layout`` keep the state where it lies on a mesh; one device needs neither.
    A step whose loss or gradient is not finite changes no weight and is counted in ``state.skipped``.
    """

    def update(state: TrainState, *batch: Any, frozen: Any = None) -> tuple[TrainState, Metrics]:
        grads, loss, metrics = global_gradient(
            loss_fn, state.params, *batch, frozen=frozen, micro_batch=micro_batch, layout=layout
        )
        norm = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        one = jnp.ones(())
        metrics = metrics | {"loss": (loss, one), "gradient_norm": (norm, one)}
        moving = state.moving
        if follow:
            decay, every = follow
            kept = jnp.where((state.step + 1) % every == 0, decay, 1.0)
            moving = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, moving, params)
        state = TrainState(state.step + 1, state.skipped + ~finite, params, opt_state, moving)
        return state, metrics

    metric_sharding = layout.sharding() if layout else None
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, metric_sharding))
