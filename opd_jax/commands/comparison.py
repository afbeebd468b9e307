"""Commands that make many runs and compare them: variants of one run, and the paper's experiments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

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


def compare(
    config: Annotated[Path, typer.Argument(help="YAML file, see configs/compare_losses.yaml")],
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="KEY=A,B,… as objective.name=full,topk; of several all combinations")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each variant; differences are paired by seed")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="directory of the runs, tables and plots; default: run_dir of the file")
    ] = None,
    topology: Annotated[
        str | None, typer.Option(help="train nothing: compile the variants for v5e-64, cpu-8, …, as opd plan does")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Trains variants of one run, as losses, side by side: the same start, prompts and random numbers, several seeds.

    One yardstick for all on held-out prompts, paired differences with intervals over seeds, what a step costs. The
    first rollouts of all variants of a seed are checked to be the same bits. After Ctrl-C, SIGTERM (exit code 3) or a
    kill the same command goes on; nothing that is done is repeated. For finished evaluations see compare-results.
    """
    from opd_jax.config_files import load_config

    check_writable("--json", json_path)
    settings = load_config(config, overrides or [])
    if topology is not None:
        check_out_directory(out)
        compile_only(topology)
        from opd_jax.compare import compare_compiled

        write_json(json_path, compare_compiled(settings, vary or [], topology, out))
        return
    from opd_jax.compare import compare as run

    write_json(json_path, run(settings, vary or [], seeds, out, stop_on_signals()))


def compare_results(
    results: Annotated[list[Path], typer.Argument(help="result.json of two or more `opd eval`, or their directories")],
    teacher: Annotated[
        Path | None, typer.Option(help="its result: then the first is before, the others after; gap recovery rates")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="directory for comparison.json, .md and .png")] = None,
    json_path: JsonPath = None,
) -> None:
    """Differences between evaluations on the same problems, with paired intervals over problems."""
    from opd_jax.evaluation.comparison import compare

    check_writable("--json", json_path)
    write_json(json_path, compare(results, teacher, out))


def paper(
    preset: Annotated[
        Literal["smoke", "mini", "full"],
        typer.Option(help="smoke: does all code run; mini: hours of a laptop; full: larger models, for more cores"),
    ] = "mini",
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="the others follow it")] = 2,
    only: Annotated[
        str | None, typer.Option(help="experiments by the paper's section, as 4.2,6.3; default: all")
    ] = None,
    out: Annotated[Path, typer.Option(help="directory of the models and runs")] = Path("runs/paper"),
    results: Annotated[
        Path | None, typer.Option(help="directory of results and figures, beside it the page; default: OUT/results")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="seeds side by side; default: one a core")] = None,
    json_path: JsonPath = None,
) -> None:
    """The paper's experiments in miniature, with seeds and intervals, and which of its claims they bear out.

    Models are made from nothing, on self-made problems. What is done is kept: the same command goes on.
    """
    check_writable("--json", json_path)
    from opd_jax.errors import Failed
    from opd_jax.paper.suite import run_experiments, tell

    where, wanted = results or out / "results", only.split(",") if only else []
    workers, stop = workers or os.cpu_count() or 1, stop_on_signals()
    rows, failed = run_experiments(preset, range(first_seed, first_seed + seeds), wanted, out, where, workers, stop)
    if rows:
        write_json(json_path, tell(rows, where))
    if failed:
        raise Failed(failed)
