"""What an analysis shows, as data: on the console, in its own HTML page, and as a section of a run's report.

An analysis returns one dict that is valid JSON (``kind``: its name, and every number), and a pure function turns that
dict into a ``Section``. So a stored result is shown again without being computed again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from matplotlib.figure import Figure

from opd_jax.errors import InputError
from opd_jax.tracking import page, plots
from opd_jax.tracking.console import console
from opd_jax.tracking.run_dir import write_atomically
from opd_jax.tracking.writers import plain


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]  # cells as ``console.table`` takes them: text, numbers, None, (mean, standard error)
    standalone: bool = False  # left out of a run's report, which shows it already


@dataclasses.dataclass(frozen=True)
class Plot:
    alt: str
    draw: Callable[[], Figure]  # as in tracking/plots.py; called only where it is shown
    standalone: bool = False  # as a table


@dataclasses.dataclass(frozen=True)
class Section:
    name: str  # of the files
    title: str
    lead: Sequence[str]  # sentences, each a paragraph
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


Sections = Mapping[str, Callable[[dict[str, Any]], Section]]
"""Kind of a result → the function that shows it."""


def show(section: Section) -> None:
    """Tables, then what they say, on the console."""
    for table in section.tables:
        console.table(table.title, table.columns, table.rows)
        console.print()
    for sentence in section.lead:
        console.print(sentence)


def write_analysis(section: Section, result: Mapping[str, Any], out: Path | epath.Path) -> None:
    """Writes ``out``/NAME.json, NAME.html (self-contained) and NAME-1.png, NAME-2.png, … of the plots.

    ``out`` may be in an object store, as that of a run.
    """
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(out / f"{section.name}.json", text)
    of_page = f"<h1>{page.escape(section.title)}</h1>{body(section)}"
    write_atomically(out / f"{section.name}.html", page.document(section.title, of_page))
    for i, plot in enumerate(section.plots, 1):
        plots.save(plot.draw(), out / f"{section.name}-{i}.png")


def body(section: Section, in_report: bool = False) -> str:
    """The section in HTML, without its title."""
    lead = "".join(f"<p>{page.escape(sentence)}</p>" for sentence in section.lead)
    tables = [table for table in section.tables if not (in_report and table.standalone)]
    drawn = [plot for plot in section.plots if not (in_report and plot.standalone)]
    numbers = "".join(f"<h3>{page.escape(t.title)}</h3>{page.table(t.columns, t.rows)}" for t in tables)
    figures = "".join(page.figure(plot.draw(), plot.alt) for plot in drawn)
    return lead + numbers + (f'<div class="plots">{figures}</div>' if figures else "")


def stored(directory: epath.Path, sections: Sections) -> list[Section]:
    """The results of known kind in a directory, by file name; [] where there is none.

    Raises:
        InputError: a file that holds no result.
    """
    found = []
    for path in sorted(directory.glob("*.json")) if directory.exists() else []:
        try:
            result = json.loads(path.read_text())
            if result["kind"] in sections:
                found.append(sections[result["kind"]](result))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise InputError(
                f"{path}: not a result of `opd analyze` as this version writes it ({e!r}). Analyse again, or delete it."
            ) from e
    return found
