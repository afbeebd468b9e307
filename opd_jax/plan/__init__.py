"""``opd plan``: does a run fit a pod that one does not have, and what bounds it. Nothing is loaded or run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.mesh import make_mesh
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.published import decoder_of
from opd_jax.plan.compiling import Line, compile_line
from opd_jax.plan.cost import Cost, Sizes, step_costs
from opd_jax.plan.programs import Programs
from opd_jax.plan.report import Plan, as_json, show
from opd_jax.plan.search import nearest
from opd_jax.plan.topology import Topology, find_topology
from opd_jax.tracking.console import console
from opd_jax.training.scoring import teachers_of
from opd_jax.training.setup import check_positions

LONG = (15_360, 31_744)  # responses of the paper's longest training runs and of its evaluations


def plan_run(
    config: Config,
    topology_name: str,
    *,
    mean_response: float | None = None,
    caches: Sequence[int] = LONG,
    search: bool = True,
) -> dict[str, Any]:
    """Compiles the programs of a run for a topology, prints what they take, and returns it for machines.

    Args:
        mean_response: tokens, for the estimate of time; None: rollout.max_response.
        caches: also the decoding of responses of so many tokens.
        search: look for a setting that fits where this one does not.

    Raises:
        InputError: unknown topology or model, libtpu missing, sizes that do not divide over the mesh, too long
            texts for a model.
    """
    topology = find_topology(topology_name)
    student, teacher = models_of(config)
    if mean_response is not None and not 0 < mean_response <= config.rollout.max_response:
        raise InputError(f"--mean-response {mean_response}: expected 1 … {config.rollout.max_response} (max_response)")
    build = functools.partial(_programs, topology=topology, student=student, teacher=teacher)
    programs = build(config)
    compiled = _Compiler(topology.usable)
    lines = compiled(programs, None, caches)
    found = None
    if search and not all(line.fits for line in lines if line.needed):
        found = nearest(config, build, compiled, topology.usable, len(topology.devices))
    costs, tokens = _costs(found.config if found else config, build, student, teacher, mean_response)
    plan = Plan(topology, config, programs, lines, costs, tokens, found)
    show(plan)
    return as_json(plan)


def models_of(config: Config) -> tuple[DecoderConfig, DecoderConfig | None]:
    """The shapes of student and teacher, by directory or hub id.

    Raises:
        InputError: an unknown model, one not made for such long texts, or a form of teaching that is not planned.
    """
    student = decoder_of(config.student.path)
    teacher = decoder_of(config.teacher.path) if config.teacher else None
    teachers = teachers_of(config)
    if len(teachers) > 1 or any(t.context for t in teachers) or config.objective.scale != 1:
        raise InputError(
            "opd plan: counts one teacher that reads what the student reads; more_teachers, teacher.context and "
            "objective.scale are not planned. Plan with the largest teacher alone, and leave room for the others."
        )
    check_positions(config, config.student.path, student)
    if config.teacher and teacher:
        check_positions(config, config.teacher.path, teacher)
    return student, teacher


def _programs(config: Config, topology: Topology, student: DecoderConfig, teacher: DecoderConfig | None) -> Programs:
    mesh = make_mesh(**config.mesh.model_dump(), devices=topology.devices)
    return Programs(config, mesh, student, teacher)


def _costs(
    config: Config, build: Any, student: DecoderConfig, teacher: DecoderConfig | None, mean_response: float | None
) -> tuple[list[Cost], float]:
    programs = build(config)
    mean = mean_response or config.rollout.max_response
    sizes = Sizes(**programs.layout.mesh.shape, micro_batch=programs.micro_batch, mean_response=mean)
    return step_costs(config, student, teacher, sizes), programs.rows * mean


class _Compiler:
    """Compiles programs with a progress line; what was compiled with the same text is not compiled again."""

    def __init__(self, usable: int):
        self._usable = usable
        self._done: dict[Any, Line] = {}

    def __call__(self, programs: Programs, names: list[str] | None, caches: Sequence[int] = ()) -> list[Line]:
        wanted = [p for p in programs.all(tuple(caches)) if names is None or p.name in names]
        with console.progress(len(wanted), "compiling", unit="program", show=("program",)) as progress:
            lines = []
            for i, program in enumerate(wanted):
                progress.update(i, {"program": program.name})
                key = program.name, program.depends_on
                if key not in self._done:
                    self._done[key] = compile_line(program, self._usable)
                lines.append(self._done[key])
            progress.update(len(wanted), {"program": "done"})
        return lines
