"""The jitted functions of a run, from shapes alone: no weight is needed to build or to compile them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.evaluation.heldout import make_measure
from opd_jax.mesh import ROLLOUT, Layout, batch_shards
from opd_jax.models.decoder import DecoderConfig
from opd_jax.objectives.grpo import grpo_loss
from opd_jax.objectives.opd import opd_loss
from opd_jax.objectives.sft import sft_loss
from opd_jax.sampling.decode import Engine, make_engine
from opd_jax.sampling.packing import pack, pack_texts
from opd_jax.teacher import make_score
from opd_jax.training.optimizer import make_optimizer
from opd_jax.training.state import TrainState, state_shardings
from opd_jax.training.step import make_update
from opd_jax.types import Params, Rollouts, Scores, Sequences


@dataclasses.dataclass(frozen=True)
class Graphs:
    """What a training step and an evaluation run on the mesh; ``opd plan`` compiles the same ones."""

    layout: Layout
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shardings: TrainState
    engine: Callable[[DecoderConfig], Engine]  # of the student, or of the teacher's own rollouts
    packing: dict[str, Any]
    pack: Callable[[Rollouts], Sequences]  # on the host
    pack_texts: Callable[[list[Any]], Sequences]  # of (prompt, response) pairs, on the host
    scorer: Callable[[DecoderConfig], Callable[[Params, Sequences], Scores]]  # of any teacher
    score: Callable[[Params, Sequences], Scores] | None  # of the first
    update: Callable[..., Any]
    update_unmeasured: Callable[..., Any]  # the same step without Eqs. 6-10
    measure: Callable[..., Any]


def make_graphs(
    config: Config,
    mesh: Mesh,
    student: DecoderConfig,
    teacher: DecoderConfig | None,
    *,
    stops: tuple[int, ...],
    vocab_size: int,
) -> Graphs:
    """Builds them; nothing is compiled before the first call.

    Raises:
        InputError: a weight that does not divide over the mesh.
    """
    layout, dtype = Layout(mesh), jnp.dtype(config.dtype)
    optimizer, schedule = make_optimizer(config.optimizer, config.steps * config.updates)
    moving = config.teacher.decay if config.teacher else None
    shardings = state_shardings(optimizer, student, layout, moving=moving is not None)
    micro_batch = rows_per_pass(config, batch_shards(layout))
    packing: Any = {"separate": not config.pack, "multiple": micro_batch, "layout": layout}
    common = {"config": student, "vocab_size": vocab_size, "dtype": dtype, "remat": config.remat, "layout": layout}
    if teacher and config.kind != "sft":
        loss = functools.partial(_opd_loss, objective=config.objective, metric_k=config.overlap_k, **common)
        quick_loss = functools.partial(loss, metrics=False)
    elif config.kind == "grpo":
        loss = quick_loss = functools.partial(grpo_loss, objective=config.objective, **common)
    else:
        loss = quick_loss = functools.partial(sft_loss, **common)
    follow = None if moving is None else (moving, config.teacher.every)  # pyright: ignore[reportOptionalMemberAccess]
    update, quick_update = (
        make_update(f, optimizer, shardings=shardings, layout=layout, micro_batch=micro_batch, follow=follow)
        for f in (loss, quick_loss)
    )
    new_engine = functools.partial(
        make_engine,
        stop_ids=stops,
        vocab_size=vocab_size,
        support=config.objective.k,
        dtype=dtype,
        layout=Layout(mesh, ROLLOUT),
    )
    scorer = functools.cache(functools.partial(make_score, dtype=dtype, layout=layout, micro_batch=micro_batch))
    return Graphs(
        layout=layout,
        optimizer=optimizer,
        schedule=schedule,
        shardings=shardings,
        engine=functools.cache(new_engine),
        packing=packing,
        pack=functools.partial(pack, **packing),
        pack_texts=functools.partial(
            pack_texts, max_prompt=config.data.max_prompt, max_response=config.rollout.max_response, **packing
        ),
        scorer=scorer,
        score=scorer(teacher) if teacher else None,
        update=update,
        update_unmeasured=quick_update,
        measure=make_measure(
            student,
            k=config.overlap_k,
            vocab_size=vocab_size,
            dtype=dtype,
            layout=layout,
            micro_batch=micro_batch,
            shown=config.log_samples * config.evaluation.samples,
        ),
    )


def rows_per_pass(config: Config, shards: int) -> int:
    """``micro_batch``; by default an eighth of the rows where they are packed, or empty rows could not be left out."""
    rows = config.rows
    if config.micro_batch or not config.pack:
        return config.micro_batch or rows
    per_shard = rows // shards
    return shards * next(n for n in range(1, per_shard + 1) if per_shard % n == 0 and 8 * n >= per_shard)


def _opd_loss(params: Params, rows: Sequences, teacher_hidden: Array, teacher_head: Array, **settings: Any) -> Any:
    return opd_loss(params, rows, Scores(teacher_hidden, teacher_head), **settings)
