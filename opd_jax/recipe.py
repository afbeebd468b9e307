"""``opd recipe``: stages in one file, each made from what the ones before left (the cold start of paper C.1).

Whether a stage is done is read from its output alone, so a kill between stages or within one repeats nothing.
"""

from __future__ import annotations

import json
import threading
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Protocol, Self, cast

from etils import epath
from pydantic import Field, model_validator

from opd_jax.checkpoints.export import export_run
from opd_jax.commands.data import filter_file
from opd_jax.config import Config, Data, Fraction, NonNegativeInt, PositiveInt, Strict
from opd_jax.config_files import dump_config, load_yaml
from opd_jax.errors import InputError, Interrupted
from opd_jax.generate import check_settings, fingerprint, generate_file, given_settings
from opd_jax.sampling.law import Law
from opd_jax.stores import is_remote, store_path
from opd_jax.tracking.console import console
from opd_jax.tracking.run_dir import RunDir, check_resumable, write_atomically
from opd_jax.training.loop import train

Row = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]
Lines = Annotated[str, Field(pattern=r"\.jsonl$")]


class State(Enum):
    ABSENT = "not begun"
    BEGUN = "begun"
    DONE = "done"


class Generate(Strict):
    """Responses of a model, as ``opd generate`` makes them."""

    model: str
    data: Data
    out: Lines
    samples: PositiveInt = 1
    problems: PositiveInt | None = None
    max_response: PositiveInt = 1024
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Fraction = 1.0
    top_k: NonNegativeInt = 0
    slots: PositiveInt = 64
    seed: NonNegativeInt = 0
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = "bfloat16"

    def reads(self) -> list[str]:
        return [self.model, *_files(self.data)]

    def state(self) -> State:
        out, meta = Path(self.out), _meta(self.out)
        if not meta.exists():
            return State.ABSENT
        law = Law(self.temperature, self.top_p, self.top_k)
        given = given_settings(self.data, self.samples, self.problems, self.max_response, law, self.seed, self.dtype)
        stored = check_settings(out, meta, given | {"model_fingerprint": fingerprint(Path(self.model))})
        whole = out.exists() and _lines(out) == stored["prompts"] * stored["samples"]
        return State.DONE if whole else State.BEGUN

    def run(self, state: State, stop: threading.Event | None) -> Row:
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        return generate_file(
            Path(self.model),
            self.data,
            Path(self.out),
            samples=self.samples,
            problems=self.problems,
            max_response=self.max_response,
            law=Law(self.temperature, self.top_p, self.top_k),
            slots=self.slots,
            seed=self.seed,
            dtype=self.dtype,
            resume=state is State.BEGUN,
            stop=stop,
        )


class Filter(Strict):
    """Those responses that are worth imitating, as ``opd data filter`` finds them."""

    rollouts: str
    out: Lines
    keep_wrong: bool = False
    max_repeated: Share = 0.3
    skip_bad: bool = False

    def reads(self) -> list[str]:
        return [self.rollouts]

    def state(self) -> State:
        out, meta = Path(self.out), _meta(self.out)
        if meta.exists():
            check_settings(out, meta, self.model_dump(exclude={"out"}))
        return State.DONE if meta.exists() and out.exists() else State.ABSENT

    def run(self, state: State, stop: threading.Event | None) -> Row:
        if Path(self.out).exists():
            raise InputError(f"{self.out}: exists, and no recipe made it. Remove it, or give another out.")
        settings = self.model_dump(exclude={"out"})
        Path(self.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(epath.Path(_meta(self.out)), json.dumps(settings, indent=2) + "\n")
        # the file appears when it is whole
        return filter_file(self.rollouts, Path(self.out), self.keep_wrong, self.max_repeated, self.skip_bad)


class Train(Config):
    """A run; its student is then a Hugging Face directory, ``run_dir/model``."""

    @property
    def out(self) -> str:
        return f"{self.run_dir}/model"

    def reads(self) -> list[str]:
        parts = [self.data, self.evaluation.data, self.off_policy and self.off_policy.data]
        teachers = [self.teacher, *self.more_teachers]
        return [self.student.path, *(t.path for t in teachers if t), *(f for part in parts for f in _files(part))]

    def state(self) -> State:
        run = RunDir(store_path(self.run_dir))
        if not run.config.exists():
            return State.ABSENT
        check_resumable(run, dump_config(self))
        ended = run.summary.exists() and json.loads(run.summary.read_text())["steps"] == self.steps
        return State.DONE if ended and store_path(self.out).exists() else State.BEGUN

    def run(self, state: State, stop: threading.Event | None) -> Row:
        if store_path(self.out).exists():  # of fewer steps
            store_path(self.out).rmtree()
        rows = train(self, resume=state is State.BEGUN, title=Path(self.run_dir).name, stop=stop)
        export_run(self.run_dir, self.out)
        return {"run_dir": self.run_dir, "evaluations": rows}


class Section(Protocol):
    """What a stage reads, what it leaves at ``out``, how far it is, and how it is done or gone on with."""

    @property
    def out(self) -> str: ...
    def reads(self) -> list[str]: ...
    def state(self) -> State: ...
    def run(self, state: State, stop: threading.Event | None) -> Row: ...


class Stage(Strict):
    """One of these."""

    generate: Generate | None = None
    filter: Filter | None = None
    train: Train | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1 or self.section is None:
            raise ValueError("a stage is one of generate, filter, train, as '- generate: {…}'")
        return self

    @property
    def section(self) -> Section:
        return cast(Section, self.generate or self.filter or self.train)

    @property
    def kind(self) -> str:
        return next(iter(self.model_fields_set))


class Recipe(Strict):
    stages: Annotated[list[Stage], Field(min_length=1)]


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe.

    Raises:
        InputError: an unreadable file, a section that is refused, two stages with one output, or a stage that reads a
            file which is not there and which no stage before it makes.
    """
    recipe = load_yaml(path, Recipe)
    made: list[str] = []
    for number, stage in enumerate(recipe.stages, start=1):
        where = f"{path}: stage {number} ({stage.kind})"
        for file in stage.section.reads():
            if not (file in made or store_path(file).exists()):
                raise InputError(
                    f"{where}: reads {file}, which is not there, nor made by a stage before. Those make: "
                    f"{', '.join(made) or 'nothing'}."
                )
        if stage.section.out in made:
            raise InputError(f"{where}: writes {stage.section.out}, as a stage before does. Give each its own.")
        made.append(stage.section.out)
    return recipe


def run_recipe(recipe: Recipe, *, resume: bool = False, stop: threading.Event | None = None) -> list[Row]:
    """Runs the stages that are not done, in their order; returns what each of them reports, None where it was done.

    Raises:
        InputError: a stage has begun and ``resume`` is not set; has begun with other settings; or stands made where
            one before it does not. Nothing has been changed. Or what a stage raises.
        Interrupted: ``stop`` was set; continue with ``resume``.
    """
    stages = recipe.stages
    states = [stage.section.state() for stage in stages]
    outs = [stage.section.out for stage in stages]
    unfinished = next((i for i, state in enumerate(states) if state is not State.DONE), len(stages))
    for i in range(unfinished + 1, len(stages)):
        if states[i] is not State.ABSENT:
            raise InputError(
                f"stage {i + 1} ({outs[i]}) is {states[i].value}, but stage {unfinished + 1} ({outs[unfinished]}), "
                f"which it is made from, is {states[unfinished].value}. Remove what stage {i + 1} left, or put back "
                f"what stage {unfinished + 1} did."
            )
    if not resume and states[0] is not State.ABSENT:
        raise InputError(f"{outs[0]}: the recipe has begun. Go on with --resume, or give its stages other outputs.")
    results: list[Row] = []
    for i, (stage, state, out) in enumerate(zip(stages, states, outs, strict=True)):
        title = f"{i + 1}/{len(stages)}  {stage.kind}: {out}"
        row: Row = {"stage": stage.kind, "out": out, "was": state.value}
        if state is State.DONE:
            console.print(f"{title}: done before")
        else:
            if stop and stop.is_set():
                raise Interrupted(f"stopped before stage {i + 1} ({out}); continue with --resume")
            with console.stage(title):
                row["result"] = stage.section.run(state, stop)
        results.append(row)
    return results


def _files(data: Data | None) -> list[str]:
    """The local files among the sources."""
    sources = [part.source or "" for part in data.parts.values()] if data else []
    return [source for source in sources if source.endswith((".jsonl", ".parquet")) and not is_remote(source)]


def _lines(path: Path) -> int:
    """Whole lines of a file that may be larger than memory."""
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 24), b""))


def _meta(out: str) -> Path:
    return Path(f"{out}.meta.json")
