"""What an analysis shows: console, files, a run's report, and stored results that cannot be read."""

from __future__ import annotations

import functools
import html
import json
import math
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from made_up_runs import make_run
from matplotlib.figure import Figure
from PIL import Image

from opd_jax.errors import InputError
from opd_jax.tracking import plots
from opd_jax.tracking.report import write_report
from opd_jax.tracking.sections import Plot, Section, Table, body, show, stored, write_analysis

NAME = "a <b> & c"


def section_of(result: dict[str, Any]) -> Section:
    draw = functools.partial(plots.curves, {"run": [{"step": s, "loss": 1.0 / s} for s in (1, 2)]}, ["loss"])
    apart = Table("apart", ["", "x"], [["y", 1]], standalone=True)
    rows = [[NAME, (0.25, 0.01), None], ["n", result["n"], math.nan]]
    return Section(
        "made-up", "Made up", [f"n is {result['n']}.", NAME], [Table("numbers", ["", "mean", "none"], rows), apart],
        [Plot("loss <over> steps", draw), Plot("alone", draw, standalone=True)],
    )  # fmt: skip


RESULT = {"kind": "made-up", "n": 7, "missing": math.nan}


def test_a_result_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(section_of(RESULT))
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("numbers", "apart", "0.250 ± 0.010", "n is 7.", NAME))
    write_analysis(section_of(RESULT), RESULT, tmp_path / "out")
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"made-up.json", "made-up.html", "made-up-1.png", "made-up-2.png"}
    assert json.loads((tmp_path / "out" / "made-up.json").read_text()) == {"kind": "made-up", "n": 7, "missing": None}
    text = (tmp_path / "out" / "made-up.html").read_text()
    assert text.count("<svg") == 2
    assert html.escape(NAME) in text
    assert NAME not in text
    assert "loss &lt;over&gt; steps" in text
    assert Image.open(tmp_path / "out" / "made-up-2.png").width > 400


def test_a_report_shows_the_results_that_it_knows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=8)
    assert stored(run.analysis, {"made-up": section_of}) == []
    write_analysis(section_of(RESULT), RESULT, run.analysis)
    (run.analysis / "other.json").write_text('{"kind": "of a later version"}')
    write_report(run, tmp_path / "with.html", {"made-up": section_of})
    write_report(run, tmp_path / "without.html")
    shown, hidden = ((tmp_path / f"{name}.html").read_text() for name in ("with", "without"))
    assert "<h2>Made up</h2><p>n is 7.</p>" in shown
    assert 'aria-label="loss &lt;over&gt; steps"' in shown
    assert 'aria-label="alone"' not in shown
    assert "apart" not in shown
    assert "Made up" not in hidden


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "made-up"}', '{"kind": "made-up", "n": '])
def test_a_damaged_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: not a result of `opd analyze`"):
        stored(epath.Path(tmp_path), {"made-up": section_of})


def test_a_section_without_plots_has_no_empty_grid() -> None:
    def never() -> Figure:
        raise AssertionError("drawn")

    section = Section("n", "t", ["one", "two"], plots=[Plot("alone", never, standalone=True)])
    assert body(section, in_report=True) == "<p>one</p><p>two</p>"
