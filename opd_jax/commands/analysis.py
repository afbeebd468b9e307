"""``opd analyze``: what a run did, and what student and teacher say of the same tokens."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from opd_jax.commands.shared import MAX_SEED, JsonPath, check_out_directory, check_writable, write_json

if TYPE_CHECKING:
    from etils import epath

    from opd_jax.analysis.pair import Sampling
    from opd_jax.tracking.sections import Section, Sections

analyze_app = typer.Typer(
    no_args_is_help=True, help="Looks into runs, and into what student and teacher say of tokens.", add_completion=False
)

MODELS_HELP = (
    "Hugging Face directories; problems with answers (JSONL, Parquet, task:NAME or a dataset id); data settings, as "
    "data.template=boxed"
)
Problems = Annotated[int, typer.Option(min=1, help="the first n problems")]
Samples = Annotated[int, typer.Option(min=1, help="rollouts of each problem")]
MaxResponse = Annotated[int, typer.Option(min=1, help="tokens; longer rollouts are cut")]
Temperature = Annotated[float, typer.Option(min=0, help="0: greedy")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="nucleus sampling; 1: off")]
Slots = Annotated[int, typer.Option(min=1, help="rollouts made, and scored, at the same time, over all devices")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of the random numbers")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="of weights and computation")]
LastNumber = Annotated[
    bool, typer.Option("--last-number", help="without \\boxed{} or Answer:, read the last number as the answer")
]
OutDir = Annotated[Path | None, typer.Option("--out", help="directory for the result as JSON, HTML page and plots")]


def known_sections() -> Sections:
    """Kind of a stored result → the function that shows it in a report; a report without results loads none."""

    def lazily(module: str) -> Callable[[dict[str, Any]], Section]:
        return lambda result: importlib.import_module(f"opd_jax.analysis.{module}").section(result)

    modules = {
        "dynamics": "dynamics",
        "reward": "reward",
        "depth": "depth",
        "diagnose": "verdicts",
        "gradients": "agreement",
    }
    return {kind: lazily(module) for kind, module in modules.items()}


@analyze_app.command()
def dynamics(
    runs: Annotated[list[str], typer.Argument(help="run directories, here or gs://…; several are compared")],
    out: Annotated[
        str | None,
        typer.Option(help="directory for dynamics.json, .html and plots; default: RUN/analysis if there is one run"),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Overlap, entropy gap, advantage, gradient norm over the steps of runs: first and last steps, change, trend with
    intervals, heat maps of entropy and KL by output position and step, and which signs of success they show.
    """
    from opd_jax.analysis.dynamics import dynamics as measure
    from opd_jax.analysis.dynamics import section
    from opd_jax.stores import is_remote, store_path
    from opd_jax.tracking.run_dir import existing_run

    _check_files(None if out is None or is_remote(out) else Path(out), json_path)
    found = [existing_run(store_path(run)) for run in runs]
    result = measure(found)
    of_run = found[0].analysis if len(found) == 1 else None
    deliver(section(result), result, of_run if out is None else store_path(out))
    write_json(json_path, result)


@analyze_app.command()
def reward(
    models: Annotated[list[str], typer.Argument(metavar="STUDENT TEACHER… SOURCE [SETTING]…", help=MODELS_HELP)],
    problems: Problems = 64,
    samples: Samples = 4,
    max_response: MaxResponse = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    slots: Slots = 64,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    last_number: LastNumber = False,
    out: OutDir = None,
    json_path: JsonPath = None,
) -> None:
    """Does a teacher's reward of a whole rollout tell right ones from wrong ones (paper §6.2, Fig. 14)?

    AUROC of the sequence mean reward, the mean of log q − log p over the tokens, with intervals over problems; its
    histograms, and the reward by position. Several teachers score the same rollouts.
    """
    _check_files(out, json_path)
    student, *teachers, data = _models_and_data(models)
    from opd_jax.analysis.reward import analyse_reward, section

    sampling = _sampling(problems, samples, max_response, temperature, top_p, seed, last_number)
    result = analyse_reward(student, teachers, data, sampling, batch=slots, dtype=dtype)
    deliver(section(result), result, out)
    write_json(json_path, result)


@analyze_app.command()
def depth(
    models: Annotated[list[str], typer.Argument(metavar="STUDENT TEACHER SOURCE [SETTING]…", help=MODELS_HELP)],
    depths: Annotated[str, typer.Option(help="tokens of the student's before the cut, as 0,256,1024")],
    continuations: Annotated[int, typer.Option("-n", min=1, help="of each cut rollout, by each model")] = 4,
    problems: Problems = 64,
    samples: Samples = 1,
    max_response: MaxResponse = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    slots: Slots = 64,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    last_number: LastNumber = False,
    out: OutDir = None,
    json_path: JsonPath = None,
) -> None:
    """Does the teacher still know better where the student has gone far (paper §6.1, Fig. 11b)?

    Cuts rollouts of the student at each depth and has both models go on from the same prefixes: accuracy of both and
    their paired difference, with intervals over problems; divergences, entropies and overlap by depth.
    """
    _check_files(out, json_path)
    student, *teachers, data = _models_and_data(models)
    from opd_jax.errors import InputError

    if len(teachers) > 1:
        raise InputError(f"depth: found {len(teachers)} teachers; expected STUDENT TEACHER SOURCE, with one of each.")
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", depths):
        raise InputError(f"--depths {depths}: expected numbers of tokens, as 0,256,1024")
    from opd_jax.analysis.depth import analyse_depth, section

    sampling = _sampling(problems, samples, max_response, temperature, top_p, seed, last_number)
    cuts = [int(text) for text in depths.split(",")]
    result = analyse_depth(student, teachers[0], data, sampling, cuts, continuations, batch=slots, dtype=dtype)
    deliver(section(result), result, out)
    write_json(json_path, result)


@analyze_app.command()
def gradients(
    models: Annotated[list[str], typer.Argument(metavar="STUDENT TEACHER… SOURCE [SETTING]…", help=MODELS_HELP)],
    problems: Problems = 32,
    samples: Samples = 2,
    tokens: Annotated[int, typer.Option(min=2, max=4096, help="to look at, spread over all rollouts")] = 512,
    directions: Annotated[
        int | None,
        typer.Option(min=0, max=65536, help="random directions to project on; 0: exact. Default: exact if small"),
    ] = None,
    max_response: MaxResponse = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    slots: Slots = 64,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    last_number: LastNumber = False,
    out: OutDir = None,
    json_path: JsonPath = None,
) -> None:
    """Do the gradients of tokens agree, or cancel (paper §6.2), and how far is each objective from the full KL?

    Norms, cosines and coherence ‖Σg‖ / Σ‖g‖ of token gradients by position and class of token, for several teachers on
    the same rollouts, with paired differences; bias and noise of each objective's gradient.
    """
    _check_files(out, json_path)
    student, *teachers, data = _models_and_data(models)
    from opd_jax.analysis.agreement import section
    from opd_jax.analysis.gradients import analyse_gradients

    sampling = _sampling(problems, samples, max_response, temperature, top_p, seed, last_number)
    result = analyse_gradients(
        student, teachers, data, sampling, tokens=tokens, directions=directions, batch=slots, dtype=dtype
    )
    deliver(section(result), result, out)
    write_json(json_path, result)


def diagnose(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDENT TEACHER… [SETTING]…",
            help="Hugging Face directories; data settings, as data.template=boxed",
        ),
    ],
    prompts: Annotated[str, typer.Option(help="problems: JSONL, Parquet, task:NAME or a dataset id")],
    problems: Problems = 64,
    samples: Samples = 4,
    max_response: MaxResponse = 1024,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    slots: Slots = 64,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    last_number: LastNumber = False,
    out: OutDir = None,
    json_path: JsonPath = None,
) -> None:
    """Does this teacher fit this student? Asked on a few hundred rollouts, before a run is paid for.

    Whether tokenizers, special ids, templates and scoring agree; overlap, entropies and divergences on the student's
    rollouts, by depth; accuracy of all, and what the teacher solves that the student does not. Says which of the
    paper's two conditions of success hold, how sure that is, what to do if not, and ranks several teachers.
    """
    _check_files(out, json_path)
    student, *teachers, data = _models_and_data([*models, prompts])
    from opd_jax.analysis.diagnose import diagnose as measure
    from opd_jax.analysis.verdicts import section

    sampling = _sampling(problems, samples, max_response, temperature, top_p, seed, last_number)
    result = measure(student, teachers, data, sampling, batch=slots, dtype=dtype)
    deliver(section(result), result, out)
    write_json(json_path, result)


def _models_and_data(given: list[str]) -> tuple[Any, ...]:
    """(student, teacher, …, data section) of STUDENT TEACHER… SOURCE [SETTING]…"""
    from opd_jax.config_files import parse_data
    from opd_jax.errors import InputError

    settings = [text for text in given if _is_setting(text)]
    places = [text for text in given if not _is_setting(text)]
    if len(places) < 3:
        raise InputError(
            f"found {', '.join(places) or 'settings alone'}; expected STUDENT, at least one TEACHER, and SOURCE: two "
            "or more Hugging Face directories and the problems, in this order."
        )
    *models, source = places
    return *map(Path, models), parse_data(source, settings)


def _is_setting(text: str) -> bool:
    return re.match(r"[\w.]+=", text) is not None and not Path(text).exists()


def _sampling(
    problems: int, samples: int, max_response: int, temperature: float, top_p: float, seed: int, last: bool
) -> Sampling:
    from opd_jax.analysis.pair import Sampling
    from opd_jax.sampling.law import Law

    return Sampling(problems, samples, max_response, Law(temperature, top_p), seed, last)


def _check_files(out: Path | None, json_path: Path | None) -> None:
    """Before anything is computed."""
    check_writable("--json", json_path)
    check_out_directory(out)


def deliver(section: Section, result: dict[str, Any], out: epath.Path | Path | None) -> None:
    """Shows a result, and writes it where a directory is given."""
    from opd_jax.tracking.console import console
    from opd_jax.tracking.sections import show, write_analysis

    show(section)
    if out is not None:
        write_analysis(section, result, out)
        console.print(f"written: {out / section.name}.html")
