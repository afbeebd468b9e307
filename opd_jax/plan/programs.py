"""The programs of a run with abstract arguments, laid out on a mesh that need not exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.plan.shapes import Shapes, per_chip
from opd_jax.sampling.decode import SEGMENT, Engine, bucket
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import sequence_shapes
from opd_jax.training.graphs import Graphs, make_graphs, rows_per_pass
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

    ``vocab_size``: of the tokenizer, where it is at hand; None: the narrower head.

    Raises:
        InputError: sizes that do not divide over the mesh.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        student: DecoderConfig,
        teacher: DecoderConfig | None,
        vocab_size: int | None = None,
    ):
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
        self.shapes = Shapes(config, self.layout)
        self.micro_batch = rows_per_pass(config, self.shapes.shards)
        self._mesh = tuple(mesh.shape.values())
        vocab = vocab_size or min(c.vocab_size for c in (student, teacher) if c)
        self.graphs: Graphs = make_graphs(config, mesh, student, teacher, stops=(vocab - 1,), vocab_size=vocab)
        self.state = self.shapes.state(student, self.graphs)
        self.weights: Params = self.shapes.params(teacher, config.dtype) if teacher else {}
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
            rows = self.shapes.evaluation_rows()
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

    def cast(self, name: str, network: DecoderConfig, params: Any) -> list[Program]:
        """Embedding and head, then layer by layer: two programs."""
        part = "master weights" if network is self.student else "teacher"
        beside = {k: v for k, v in self.always.items() if k != part}
        made = self.shapes.decode_weights(network)
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
        tokens, lengths = self.shapes.prompts(self.slots)
        return Program(
            "prefill",
            lambda: engine.prefill.lower(weights, tokens, lengths),
            {"decode weights": per_chip(weights)},
            self.always | {"cache": per_chip(slots.cache)},
            (self._mesh, self.slots, self.slots < self.rows),
        )

    def place(self) -> Program:
        engine, weights, slots = self._filling()
        tokens, lengths = self.shapes.prompts(self.slots)
        hidden, cache = jax.eval_shape(engine.prefill, weights, tokens, lengths)
        hidden, cache = self.shapes.prefilled((hidden, cache))
        source, ids = (self.shapes.of_slots(self.slots, dtype) for dtype in (jnp.int32, jnp.uint32))
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
        columns = self.shapes.columns() if self.slots < self.rows else min(first, self.shapes.columns())
        return engine, self.shapes.decode_weights(self.student), self.shapes.slots(engine, self.slots, columns)

    def segment(self, name: str, network: DecoderConfig, slots: int, length: int, *, needed: bool = True) -> Program:
        """A segment of decoding at the widest cache that ``length`` columns of prompt and response need."""
        engine = self.graphs.engine(network)
        weights, state = (
            self.shapes.decode_weights(network),
            self.shapes.slots(engine, slots, self.shapes.columns(length)),
        )
        arguments = {"decode weights": per_chip(weights), "cache": per_chip(state.cache)}
        scalars = (Law(), length, SEGMENT, slots + 1)
        depends_on = self._mesh, slots, length
        lower = lambda: engine.segment.lower(weights, state, *scalars)  # noqa: E731
        return Program(name, lower, arguments, self.always, depends_on, needed)

    def score(self) -> Program:
        resident = {k: v for k, v in self.always.items() if k != "teacher"}
        score: Any = self.graphs.score
        sequences = self.shapes.sequences(self.config.rows)
        return Program(
            "teacher scoring",
            lambda: jax.jit(lambda *x: score(*x).hidden).lower(self.weights, sequences),
            {"teacher": self.always["teacher"], "sequences": per_chip(sequences)},
            resident,
            (self._mesh, self.micro_batch),
        )

    def update(self, *, measured: bool = True) -> Program:
        """With the metrics of Eqs. 6–10, or as the steps between two measurements run it."""
        update = self.graphs.update if measured else self.graphs.update_unmeasured
        state, sequences = {k: self.always[k] for k in STATE}, self.shapes.sequences(self.config.rows)
        depends_on = self._mesh, self.micro_batch, self.config.remat
        if self.teacher is None or self.config.kind == "sft":
            parts = state | {"sequences": per_chip(sequences)}
            return Program("update", lambda: update.lower(self.state, sequences), parts, {}, depends_on)
        hidden, teacher_head = self.shapes.hidden(sequences, self.teacher), head(self.weights)
        return Program(
            "update",
            lambda: update.lower(self.state, sequences, hidden, frozen=teacher_head),
            state | self._scored(sequences, hidden),
            {"teacher": self.always["teacher"] - per_chip(teacher_head)},
            depends_on,
        )

    def measure(self, rows: int) -> Program:
        assert self.teacher
        longest = self.config.evaluation.max_response or self.config.rollout.max_response
        packed = -(-rows // self.micro_batch) * self.micro_batch
        shapes = sequence_shapes(packed, self.config.data.max_prompt, longest, self.config.objective.k)
        sequences = self.shapes.rows_of(shapes)
        hidden, teacher_head = self.shapes.hidden(sequences, self.teacher), head(self.weights)
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
