"""The state of a run: what a checkpoint holds and an update changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, abstract_params, parameter_shardings
from opd_jax.types import Params


@flax.struct.dataclass
class TrainState:
    step: Array  # int32, updates done (skipped ones included)
    skipped: Array  # int32, updates skipped because the gradient was not finite
    params: Params  # float32 master weights
    opt_state: Any
    moving: Params = flax.struct.field(default_factory=dict)  # float32 weights of a teacher that follows; or nothing


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    moving: Params | None = None,
) -> TrainState:
    """A fresh state around ``params``, sharded as ``state_shardings`` says; one device needs none."""

    def create(params: Params, moving: Params) -> TrainState:
        return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params), moving)

    return jax.jit(create, out_shardings=shardings)(params, moving or {})


def state_shardings(
    optimizer: optax.GradientTransformation, config: DecoderConfig, layout: Layout, moving: bool = False
) -> TrainState:
    """The sharding of every array of a TrainState: moments, and the weights of a moving teacher, lie as weights do."""
    of_params = parameter_shardings(config, layout)
    scalar = layout.sharding()
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params(config)),
        of_params,
        transform_non_params=lambda _: scalar,
    )
    return TrainState(scalar, scalar, of_params, moments, of_params if moving else {})  # pyright: ignore[reportArgumentType]
