"""Profiler traces of chosen steps: they are there, hold those steps and no others, and reach object stores."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath

from opd_jax.config_files import parse_config
from opd_jax.errors import InputError
from opd_jax.tracking import trace as tracing
from opd_jax.tracking.trace import StepTrace


def run_steps(directory: Any, steps: tuple[int, int] | None, made: range) -> None:
    with StepTrace(epath.Path(directory), steps) as trace:
        for n in made:
            with trace.step(n):
                jnp.arange(8).sum().block_until_ready()


def traced_steps(directory: Path) -> list[str]:
    (file,) = directory.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(e["args"]["step_num"] for e in events if e.get("name") == "step")


def test_trace_holds_its_steps(tmp_path: Path) -> None:
    run_steps(tmp_path / "profile", (2, 3), range(1, 6))
    assert traced_steps(tmp_path / "profile") == ["2", "3"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_starts_or_ends_inside(tmp_path: Path) -> None:
    run_steps(tmp_path / "resumed", (2, 4), range(3, 6))
    assert traced_steps(tmp_path / "resumed") == ["3", "4"]
    with pytest.raises(RuntimeError), StepTrace(epath.Path(tmp_path / "failed"), (1, 9)) as trace, trace.step(1):
        raise RuntimeError("a step that fails")
    assert traced_steps(tmp_path / "failed") == ["1"]


def test_nothing_is_written_unasked(tmp_path: Path) -> None:
    run_steps(tmp_path / "none", None, range(1, 3))
    run_steps(tmp_path / "past", (1, 2), range(3, 5))
    assert not list(tmp_path.iterdir())


def test_stores_get_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {}
    monkeypatch.setattr(tracing, "upload", lambda file, target: sent.update({os.fspath(target): file.read_bytes()}))
    run_steps("gs://bucket/run/profile", (1, 1), range(1, 3))
    assert {name.rpartition(".")[2] for name in sent} == {"pb", "gz"}
    assert all(name.startswith("gs://bucket/run/profile/plugins/profile/") for name in sent)
    assert all(sent.values())


@pytest.mark.parametrize("steps", [[3], [5, 4], [0, 3], [2, 11], "3-5"])
def test_steps_that_cannot_be(steps: Any) -> None:
    tree = {"run_dir": "r", "steps": 10, "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"source": "d"}}
    assert parse_config(tree | {"profile": [3, 5]}).profile == [3, 5]
    with pytest.raises(InputError, match="profile"):
        parse_config(tree | {"profile": steps})
