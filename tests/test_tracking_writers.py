"""Numbers that go to Weights & Biases as well: a stand-in for the package, which need not be installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opd_jax.config_files import dump_config, parse_config
from opd_jax.errors import InputError
from opd_jax.tracking.run_dir import RunDir, open_run
from opd_jax.tracking.writers import MetricWriter, check_wandb


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, row: dict[str, float], step: int) -> None:
        self.logged.append((step, row))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.started, module.runs = [], []

    def init(**settings: Any) -> FakeRun:
        module.started.append(settings)
        module.runs.append(FakeRun())
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run_at(path: Path, resume: bool = False) -> RunDir:
    tree = {"run_dir": str(path), "steps": 10, "student": {"path": "s"}, "teacher": {"path": "t"}}
    return open_run(path, dump_config(parse_config(tree | {"data": {"source": "task:products"}})), resume)


def test_numbers_go_there_too(wandb: Any, tmp_path: Path) -> None:
    with MetricWriter(run_at(tmp_path / "a"), wandb="project") as writer:
        writer.write_evaluation(0, {"who": "teacher", "accuracy": 0.9})
        writer.write(1, {"loss": 0.5, "nan": float("nan"), "overlap_by_position": [0.1, 0.2], "alarm": "text"})
        writer.write_samples(1, [{"response": "not a number"}])
    (run,), (settings,) = wandb.runs, wandb.started
    assert run.logged == [(0, {"evaluation/teacher/accuracy": 0.9}), (1, {"loss": 0.5})]
    assert run.finished
    assert (settings["project"], settings["name"], settings["resume"]) == ("project", "a", "allow")
    assert settings["config"]["data"]["source"] == "task:products"
    assert settings["dir"] == str(tmp_path / "a")


def test_a_resumed_run_is_the_same_there_and_another_is_not(wandb: Any, tmp_path: Path) -> None:
    for path, resume in (("a", False), ("a", True), ("b", False)):
        MetricWriter(run_at(tmp_path / path, resume), wandb="project").close()
    first, resumed, other = (settings["id"] for settings in wandb.started)
    assert first == resumed != other


def test_without_a_project_nothing_starts(wandb: Any, tmp_path: Path) -> None:
    with MetricWriter(run_at(tmp_path / "a")) as writer:
        writer.write(1, {"loss": 0.5})
    assert not wandb.started


def test_what_does_not_start_is_refused(wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(InputError, match=r"wandb=project: .*api_key not configured.*wandb login.*WANDB_MODE=offline"):
        MetricWriter(run_at(tmp_path / "a"), wandb="project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb=project: .*pip install 'opd-jax\[wandb\]'"):
        check_wandb("project")
    check_wandb(None)
