"""What commands share: options, files that results are written to, and how a process begins and ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_SEED = 2**30 - 1  # the demo takes two seeds from it, below 2³¹

Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings that override the file, as optimizer.lr=1e-5 rollout.samples=2")
]
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


def compile_only(topology: str) -> None:
    """Keeps JAX off this machine's accelerator, and the TPU compiler from looking for one and telling of it."""
    # by environment, before JAX is imported
    if topology == "cuda":
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": topology,
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def stop_on_signals() -> threading.Event:
    """SIGTERM, and the first Ctrl-C, ask the run to save and stop; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop
