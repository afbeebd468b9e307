"""``opd analyze``: what a run did, and what student and teacher say of the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from opd_jax.result_files import JsonPath, check_writable, write_json

if TYPE_CHECKING:
    from etils import epath

    from opd_jax.tracking.sections import Section, Sections

analyze_app = typer.Typer(
    no_args_is_help=True, help="Looks into runs, and into what student and teacher say of tokens.", add_completion=False
)


def known_sections() -> Sections:
    """Kind of a stored result → the function that shows it in a report."""
    from opd_jax.analysis import dynamics

    return {"dynamics": dynamics.section}


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
    from opd_jax.stores import store_path
    from opd_jax.tracking.run_dir import existing_run

    check_writable("--json", json_path)
    found = [existing_run(store_path(run)) for run in runs]
    result = measure(found)
    of_run = found[0].analysis if len(found) == 1 else None
    deliver(section(result), result, of_run if out is None else store_path(out))
    write_json(json_path, result)


def deliver(section: Section, result: dict[str, Any], out: epath.Path | None) -> None:
    """Shows a result, and writes it where a directory is given."""
    from opd_jax.tracking.console import console
    from opd_jax.tracking.sections import show, write_analysis

    show(section)
    if out is not None:
        write_analysis(section, result, out)
        console.print(f"written: {out / section.name}.html")
