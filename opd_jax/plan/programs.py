"""The programs of a run with abstract arguments, laid out on a mesh that need not exist."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.config import Config, Positions
from opd_jax.evaluation.heldout import batch_rows
from opd_jax.mesh import ROLLOUT, Axes, Layout, batch_shards
from opd_jax.models.decoder import (
    DecoderConfig,
    abstract_params,
    head,
    layer_specs,
    parameter_shardings,
    parameter_specs,
)
from opd_jax.sampling.decode import SEGMENT, Engine, bucket
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import sequence_shapes
from opd_jax.training.graphs import Graphs, make_graphs, rows_per_pass
from opd_jax.training.state import TrainState
from opd_jax.types import Params, Sequences

Parts = dict[str, int]
"""What lies on a chip → bytes."""

STATE = ("master weights", "optimizer")
OF_ROWS = ("teacher scoring", "update", "evaluation: measures")  # what passes of micro_batch rows go through
SLOTS_OF = {  # the setting that gives the slots of a segment
    "prefill": "rollout.slots",
    "prompts into slots": "rollout.slots",
    "rollout segment": "rollout.slots",
    "evaluation: segment": "evaluation.batch",
    "evaluation: teacher's segment": "evaluation.batch",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compilation. ``arguments`` and ``resident`` say by name what it reads and what lies beside it meanwhile."""

    name: str
    lower: Callable[[], Any]
    arguments: Parts
    resident: Parts
    depends_on: tuple[Any, ...]  # the settings; equal ones need no second compilation
    needed: bool = True  # False: a line that only answers "what if"


class Programs:
    """Those of one configuration on one mesh, in the order in which a step runs them.

    Raises:
        InputError: sizes that do not divide over the mesh.
    """

    def __init__(self, config: Config, mesh: Mesh, student: DecoderConfig, teacher: DecoderConfig | None):
        self.config, self.student, self.teacher = config, student, teacher
        self.layout = Layout(mesh)
        self.rows = config.rollout.prompts * config.rollout.samples  # of a step; an update has config.rows
        self.slots = min(config.rollout.slots or self.rows, self.rows)
        for what, size in {
            "rollout.prompts × rollout.samples": self.rows,
            "rollout.slots": self.slots,
            "micro_batch": config.micro_batch or config.rows,
        }.items():
            self.layout.check(what, (size,), ("batch",))
        self.shards = batch_shards(self.layout)
        self.micro_batch = rows_per_pass(config, self.shards)
        self._mesh = tuple(mesh.shape.values())
        self._decoding = Layout(mesh, ROLLOUT)
        vocab = min(c.vocab_size for c in (student, teacher) if c)
        self.graphs: Graphs = make_graphs(config, mesh, student, teacher, stops=(vocab - 1,), vocab_size=vocab)
        self.state = self._state()
        self.weights: Params = self._params(teacher, config.dtype) if teacher else {}
        sizes = per_chip(self.state.params), per_chip((self.state.opt_state, self.state.moving))
        self.always: Parts = dict(zip(STATE, sizes, strict=True)) | (
            {"teacher": per_chip(self.weights)} if self.weights else {}
        )

    def all(self, caches: tuple[int, ...] = ()) -> list[Program]:
        """The programs; ``caches``: also a segment for responses of that many tokens, apart from the run."""
        config, evaluation = self.config, self.config.evaluation
        prompt, longest = config.data.max_prompt, config.rollout.max_response
        samples = config.kind != "sft" and config.sampled_prompts > 0
        found: list[Program] = []
        if samples or evaluation.data:
            name = "weights for the rollout" if samples else "weights for the evaluation"
            found += self.cast(name, self.student, self.state.params)
        if samples:
            rollout = self.segment("rollout segment", self.student, self.slots, prompt + longest)
            found += [self.prefill(), self.place(), rollout]
        found += [self.score(), self.update()] if self.teacher and config.kind != "sft" else [self.update()]
        if evaluation.data:
            length = evaluation.data.max_prompt + (evaluation.max_response or longest)
            rows = self.evaluation_rows()
            found.append(self.segment("evaluation: segment", self.student, rows, length))
            if self.teacher:
                found += [
                    self.measure(rows),
                    *self.cast("evaluation: teacher's weights", self.teacher, self.weights),
                    self.segment("evaluation: teacher's segment", self.teacher, rows, length),
                ]
        return found + [
            self.segment(f"segment, responses of {n:,}", self.student, self.slots, prompt + n, needed=False)
            for n in caches
            if samples
        ]

    def evaluation_rows(self) -> int:
        evaluation = self.config.evaluation
        return batch_rows(evaluation.problems * evaluation.samples, evaluation.batch, self.shards)

    def cast(self, name: str, network: DecoderConfig, params: Any) -> list[Program]:
        """Embedding and head, then layer by layer: two programs."""
        part = "master weights" if network is self.student else "teacher"
        beside = {k: v for k, v in self.always.items() if k != part}
        made = self._decode_weights(network)
        stacked, ends = params["layers"], {k: w for k, w in params.items() if k != "layers"}
        kept_layers, kept_ends = per_chip(made["layers"]), per_chip({k: w for k, w in made.items() if k != "layers"})
        one = kept_layers // network.layers
        engine = lambda: self.graphs.engine(network)  # noqa: E731
        return [
            Program(
                f"{name}: ends",
                lambda: engine().ends.lower(ends),
                {part: per_chip(ends)},
                beside | {f"other {part}": per_chip(stacked)},
                self._mesh,
            ),
            Program(
                name,
                lambda: engine().layer.lower(stacked, 0),
                {part: per_chip(stacked)},
                beside | {f"other {part}": per_chip(ends), "decode weights": kept_ends + kept_layers - one},
                self._mesh,
            ),
        ]

    def prefill(self) -> Program:
        engine, weights, slots = self._filling()
        tokens, lengths = self._prompts()
        return Program(
            "prefill",
            lambda: engine.prefill.lower(weights, tokens, lengths),
            {"decode weights": per_chip(weights)},
            self.always | {"cache": per_chip(slots.cache)},
            (self._mesh, self.slots, self.slots < self.rows),
        )

    def place(self) -> Program:
        engine, weights, slots = self._filling()
        tokens, lengths = self._prompts()
        hidden, cache = jax.eval_shape(engine.prefill, weights, tokens, lengths)
        hidden, cache = jax.tree.map(
            lambda x: self._shaped(x.shape, x.dtype, _row_axes(x), self._decoding), (hidden, cache)
        )
        source, ids = (self._shaped((self.slots,), dtype, ()) for dtype in (jnp.int32, jnp.uint32))
        return Program(
            "prompts into slots",
            lambda: engine.place.lower(slots, hidden, cache, lengths, source, (0, 0, ids, ids)),
            {"cache": per_chip(slots.cache), "prompts": per_chip((hidden, cache))},
            self.always | {"decode weights": per_chip(weights)},
            (self._mesh, self.slots, self.slots < self.rows),
        )

    def _filling(self) -> tuple[Engine, Params, Any]:
        """Engine, weights and slots when prompts enter; with refills, the cache then is as wide as it ever is."""
        engine = self.graphs.engine(self.student)
        first = bucket(self.config.data.max_prompt + min(SEGMENT, self.config.rollout.max_response))
        columns = self._columns() if self.slots < self.rows else min(first, self._columns())
        return engine, self._decode_weights(self.student), self._slots(engine, self.slots, columns)

    def _prompts(self) -> tuple[Any, Any]:
        # as in the scheduler's first prefill: prompts of a shard without their repeats, in powers of four
        of_shard = self.slots // self.shards
        prompts = -(-of_shard // self.config.rollout.samples)
        rows = self.shards * min(next(4**i for i in range(20) if 4**i >= prompts), of_shard)
        width = min(bucket(self.config.data.max_prompt, 16), self.config.data.max_prompt)
        return self._shaped((rows, width), jnp.int32, ()), self._shaped((rows,), jnp.int32, ())

    def segment(self, name: str, network: DecoderConfig, slots: int, length: int, *, needed: bool = True) -> Program:
        """A segment of decoding at the widest cache that ``length`` columns of prompt and response need."""
        engine = self.graphs.engine(network)
        weights, state = self._decode_weights(network), self._slots(engine, slots, self._columns(length))
        arguments = {"decode weights": per_chip(weights), "cache": per_chip(state.cache)}
        scalars = (Law(), length, SEGMENT, slots + 1)
        depends_on = self._mesh, slots, length
        lower = lambda: engine.segment.lower(weights, state, *scalars)  # noqa: E731
        return Program(name, lower, arguments, self.always, depends_on, needed)

    def score(self) -> Program:
        resident = {k: v for k, v in self.always.items() if k != "teacher"}
        score: Any = self.graphs.score
        sequences = self._sequences(self.config.rows)
        return Program(
            "teacher scoring",
            lambda: jax.jit(lambda *x: score(*x).hidden).lower(self.weights, sequences),
            {"teacher": self.always["teacher"], "sequences": per_chip(sequences)},
            resident,
            (self._mesh, self.micro_batch),
        )

    def update(self) -> Program:
        state, sequences = {k: self.always[k] for k in STATE}, self._sequences(self.config.rows)
        depends_on = self._mesh, self.micro_batch, self.config.remat
        if self.teacher is None or self.config.kind == "sft":
            parts = state | {"sequences": per_chip(sequences)}
            return Program("update", lambda: self.graphs.update.lower(self.state, sequences), parts, {}, depends_on)
        hidden, teacher_head = self._hidden(sequences), head(self.weights)
        return Program(
            "update",
            lambda: self.graphs.update.lower(self.state, sequences, hidden, frozen=teacher_head),
            state | self._scored(sequences, hidden),
            {"teacher": self.always["teacher"] - per_chip(teacher_head)},
            depends_on,
        )

    def measure(self, rows: int) -> Program:
        longest = self.config.evaluation.max_response or self.config.rollout.max_response
        packed = -(-rows // self.micro_batch) * self.micro_batch
        shapes = sequence_shapes(packed, self.config.data.max_prompt, longest, self.config.objective.k)
        sequences = self._rows_of(shapes)
        hidden, teacher_head = self._hidden(sequences), head(self.weights)
        return Program(
            "evaluation: measures",
            lambda: self.graphs.measure.lower(self.state.params, sequences, hidden, teacher_head),
            {"master weights": self.always["master weights"]} | self._scored(sequences, hidden),
            {"optimizer": self.always["optimizer"], "teacher": self.always["teacher"] - per_chip(teacher_head)},
            (self._mesh, self.micro_batch, rows),
        )

    def _scored(self, sequences: Sequences, hidden: Any) -> Parts:
        return {
            "sequences": per_chip(sequences),
            "teacher states": per_chip(hidden),
            "teacher's head": per_chip(head(self.weights)),
        }

    def _columns(self, length: int | None = None) -> int:
        """Cache columns as the scheduler gives them: a slot may be a segment ahead of its last column."""
        length = length or self.config.data.max_prompt + self.config.rollout.max_response
        return min(bucket(length + SEGMENT), length + SEGMENT)

    def _shaped(self, shape: tuple[int, ...], dtype: Any, axes: Axes, layout: Layout | None = None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=(layout or self.layout).sharding(axes))

    def _params(self, network: DecoderConfig, dtype: Any) -> Params:
        shardings = parameter_shardings(network, self.layout)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s),
            abstract_params(network),
            shardings,
        )

    def _state(self) -> TrainState:
        params = self._params(self.student, jnp.float32)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        moving = params if self.config.teacher and self.config.teacher.decay is not None else {}
        optimizer = jax.eval_shape(self.graphs.optimizer.init, params)
        state = TrainState(count, count, params, optimizer, moving)  # pyright: ignore[reportArgumentType]
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, self.graphs.shardings
        )

    def _decode_weights(self, network: DecoderConfig) -> Params:
        specs, layer = parameter_specs(network), layer_specs(network)
        dtype = jnp.dtype(self.config.dtype)

        def shaped(spec: Any) -> Any:
            return self._shaped(spec.shape, dtype, spec.axes, self._decoding)

        one = {name: shaped(spec) for name, spec in layer.items()}
        return {n: shaped(s) for n, s in specs.items() if n != "layers"} | {"layers": [one] * network.layers}

    def _slots(self, engine: Engine, slots: int, columns: int) -> Any:
        state = jax.eval_shape(lambda: engine.empty(slots, columns))
        return jax.tree.map(lambda x: self._shaped(x.shape, x.dtype, _row_axes(x), self._decoding), state)

    def _sequences(self, rows: int) -> Sequences:
        """As they are trained on."""
        config = self.config
        k = None if config.kind == "sft" or config.off_policy else config.objective.k
        longest, rewarded = config.rollout.max_response, config.reward is not None
        shapes = sequence_shapes(rows, config.data.max_prompt, longest, k, rewarded)
        if self.config.positions != Positions():
            weight = jax.ShapeDtypeStruct(shapes.tokens.shape, jnp.float32)
            shapes = dataclasses.replace(shapes, weight=weight)  # pyright: ignore[reportArgumentType]
        return self._rows_of(shapes)

    def _rows_of(self, shapes: Sequences) -> Sequences:
        return jax.tree.map(lambda x: self._shaped(x.shape, x.dtype, ("batch",)), shapes)

    def _hidden(self, sequences: Sequences) -> Any:
        assert self.teacher
        shape = (*sequences.tokens.shape, self.teacher.width)
        return self._shaped(shape, jnp.dtype(self.config.dtype), ("batch",))


def _row_axes(x: Any) -> Axes:
    """Of the arrays of decoding: a cache [B, K, S, H], a scalar, or rows."""
    return {0: (), 4: ("batch", "kv_heads", None, None)}.get(x.ndim, ("batch",))


def per_chip(tree: Any) -> int:
    """Bytes of abstract arrays on one chip, without the padding of its memory layout."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
