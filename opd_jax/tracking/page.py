"""Pieces of a self-contained HTML page: no network, no script; whatever stands in a cell is shown as text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from typing import Any

from matplotlib.figure import Figure

from opd_jax.tracking.labels import format_value
from opd_jax.tracking.plots import svg


def escape(value: Any) -> str:
    return html.escape(str(value))


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], css: str = "numbers") -> str:
    """Cells as ``console.table`` takes them; a ``None`` is left out where the page is narrow."""
    head = f"<thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in heads)}</tr></thead>" if heads else ""
    names = heads or [""] * max(map(len, rows))

    def cell(name: str, value: Any) -> str:
        # On a narrow page each row becomes a block whose cells carry their column's name.
        missing = ' class="missing"' if value is None else ""
        return f'<td{missing} data-head="{escape(name)}">{escape(format_value(value))}</td>'

    body = "".join(f"<tr>{''.join(map(cell, names, row))}</tr>" for row in rows)
    return f'<div class="card scroll"><table class="{css}">{head}<tbody>{body}</tbody></table></div>'


def figure(drawn: Figure, description: str) -> str:
    return f'<figure role="img" aria-label="{escape(description)}">{svg(drawn)}</figure>'


def plots(heading: str, figures: Sequence[str]) -> str:
    return f'<h2>{escape(heading)}</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def document(title: str, body: str) -> str:
    css = resources.files("opd_jax.tracking").joinpath("report.css").read_text(encoding="utf-8")
    # The policy makes the browser refuse scripts and network even if an escape were forgotten.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
