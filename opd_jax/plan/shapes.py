"""The abstract arguments of a run's programs: shapes and shardings of everything that lies on the chips."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.config import Config, Positions
from opd_jax.evaluation.heldout import batch_rows
from opd_jax.mesh import ROLLOUT, Axes, Layout, batch_shards
from opd_jax.models.decoder import (
    DecoderConfig,
    abstract_params,
    layer_specs,
    parameter_shardings,
    parameter_specs,
)
from opd_jax.sampling.decode import SEGMENT, Engine, bucket
from opd_jax.sampling.packing import sequence_shapes
from opd_jax.training.graphs import Graphs
from opd_jax.training.state import TrainState
from opd_jax.types import Params, Sequences


class Shapes:
    """Of one configuration on one mesh; all but the decode weights, caches and prompts as training lays them out."""

    def __init__(self, config: Config, layout: Layout):
        self.config, self.layout = config, layout
        self.shards = batch_shards(layout)
        self._decoding = Layout(layout.mesh, ROLLOUT)

    def evaluation_rows(self) -> int:
        evaluation = self.config.evaluation
        return batch_rows(evaluation.problems * evaluation.samples, evaluation.batch, self.shards)

    def prompts(self, slots: int) -> tuple[Any, Any]:
        """Tokens and lengths."""
        # as in the scheduler's first prefill: prompts of a shard without their repeats, in powers of four
        of_shard = slots // self.shards
        prompts = -(-of_shard // self.config.rollout.samples)
        rows = self.shards * min(next(4**i for i in range(20) if 4**i >= prompts), of_shard)
        width = min(bucket(self.config.data.max_prompt, 16), self.config.data.max_prompt)
        return self._shaped((rows, width), jnp.int32, ()), self._shaped((rows,), jnp.int32, ())

    def prefilled(self, arrays: Any) -> Any:
        """What the prefill returns, laid out as decoding has it."""
        return jax.tree.map(lambda x: self._shaped(x.shape, x.dtype, _row_axes(x), self._decoding), arrays)

    def of_slots(self, slots: int, dtype: Any) -> Any:
        return self._shaped((slots,), dtype, ())

    def columns(self, length: int | None = None) -> int:
        """Cache columns as the scheduler gives them: a slot may be a segment ahead of its last column."""
        length = length or self.config.data.max_prompt + self.config.rollout.max_response
        return min(bucket(length + SEGMENT), length + SEGMENT)

    def _shaped(self, shape: tuple[int, ...], dtype: Any, axes: Axes, layout: Layout | None = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=(layout or self.layout).sharding(axes))

    def params(self, network: DecoderConfig, dtype: Any) -> Params:
        shardings = parameter_shardings(network, self.layout)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s),
            abstract_params(network),
            shardings,
        )

    def state(self, student: DecoderConfig, graphs: Graphs) -> TrainState:
        params = self.params(student, jnp.float32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        moving = params if self.config.teacher and self.config.teacher.decay is not None else {}
        optimizer = jax.eval_shape(graphs.optimizer.init, params)
        state = TrainState(count, count, params, optimizer, moving)  # pyright: ignore[reportArgumentType]
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, graphs.shardings)

    def decode_weights(self, network: DecoderConfig) -> Params:
        specs, layer = parameter_specs(network), layer_specs(network)
        dtype = jnp.dtype(self.config.dtype)

        def shaped(spec: Any) -> Any:
            return self._shaped(spec.shape, dtype, spec.axes, self._decoding)

        one = {name: shaped(spec) for name, spec in layer.items()}
        return {n: shaped(s) for n, s in specs.items() if n != "layers"} | {"layers": [one] * network.layers}

    def slots(self, engine: Engine, slots: int, columns: int) -> Any:
        state = jax.eval_shape(lambda: engine.empty(slots, columns))
        return jax.tree.map(lambda x: self._shaped(x.shape, x.dtype, _row_axes(x), self._decoding), state)

    def sequences(self, rows: int) -> Sequences:
        """As they are trained on."""
        config = self.config
        k = None if config.kind == "sft" or config.off_policy else config.objective.k
        longest, rewarded = config.rollout.max_response, config.reward is not None
        shapes = sequence_shapes(rows, config.data.max_prompt, longest, k, rewarded)
        if self.config.positions != Positions():
            weight = jax.ShapeDtypeStruct(shapes.tokens.shape, jnp.float32)
            shapes = dataclasses.replace(shapes, weight=weight)  # pyright: ignore[reportArgumentType]
        return self.rows_of(shapes)

    def rows_of(self, shapes: Sequences) -> Sequences:
        return jax.tree.map(lambda x: self._shaped(x.shape, x.dtype, ("batch",)), shapes)

    def hidden(self, sequences: Sequences, network: DecoderConfig) -> Any:
        shape = (*sequences.tokens.shape, network.width)
        return self._shaped(shape, jnp.dtype(self.config.dtype), ("batch",))


def _row_axes(x: Any) -> Axes:
    """Of the arrays of decoding: a cache [B, K, S, H], a scalar, or rows."""
    return {0: (), 4: ("batch", "kv_heads", None, None)}.get(x.ndim, ("batch",))


def per_chip(tree: Any) -> int:
    """Bytes of abstract arrays on one chip, without the padding of its memory layout."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
