"""``--json PATH`` and other files that a command writes its result to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

JsonPath = Annotated[Path | None, typer.Option("--json", help="also write the result here, for machines")]


def check_writable(option: str, path: Path | None) -> None:
    """Hours of work must not be lost to a result that cannot be written."""
    from opd_jax.errors import InputError

    if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
        raise InputError(f"{option} {path}: cannot be written. Give a file in an existing directory.")


def check_out_directory(out: Path | None) -> None:
    """A directory for results need not exist, but its parent has to."""
    from opd_jax.errors import InputError

    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file. Give a directory.")
    check_writable("--out", None if out is None else out / "result.json" if out.exists() else out)


def write_json(path: Path | None, result: Any) -> None:
    """Writes the result of a command where ``--json`` asks for it; of several processes only the first does."""
    if path:
        import jax

        from opd_jax.tracking.writers import plain

        if jax.process_index():
            return

        path.write_text(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
