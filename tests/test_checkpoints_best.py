"""Every new best checkpoint as a Hugging Face directory: what `opd export --best` would write, whole at any moment."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_store
import jax
import numpy as np
import pytest
import test_hosts
import tiny_runs
from etils import epath
from tiny_runs import STUDENT

from opd_jax.checkpoints.export import export_best, export_run
from opd_jax.checkpoints.state import Checkpoints
from opd_jax.config import Config
from opd_jax.config_files import dump_config, parse_config
from opd_jax.errors import InputError
from opd_jax.models.hf import load_model
from opd_jax.tracking.run_dir import open_run, read_rows
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training import loop
from opd_jax.training.loop import train

TESTS = Path(__file__).parent
HELD_OUT = {"source": f"task:{tiny_runs.TASK}", "chat": False, "max_prompt": 8, "limit": 4}


def config_of(models: Path, run_dir: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "steps": 3,
        "evaluation": {"data": HELD_OUT, "problems": 4, "samples": 2, "batch": 8, "every": 1},
        "checkpoint": {"best": "reverse_kl", "export_best": True, "keep": 1},
    }
    return tiny_runs.run_config(models, run_dir, "opd", **settings | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_the_best_of_a_run_is_exported_and_pushed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 2 is the best of three; the upload of step 1 fails, which ends nothing; logs are flushed before a save."""
    done: list[Any] = []
    values = {0: 9.0, 1: 0.5, 2: 0.25, 3: 0.3}
    evaluate, write, flush, save = (
        loop._evaluate, MetricWriter.write_evaluation, MetricWriter.flush, Checkpoints.save,
    )  # fmt: skip

    def push(directory: Path, repository: str, *, private: bool) -> str:
        done.append(("push", repository, private, files(directory)))
        if len(done) < 6:
            raise InputError("the network is down")
        return "https://hub/commit"

    monkeypatch.setattr(loop, "_evaluate", lambda *a: evaluate(*a) | {"reverse_kl": values[a[3]]})
    monkeypatch.setattr(
        MetricWriter, "write_evaluation", lambda self, step, row: write(self, step, row | {"reverse_kl": values[step]})
    )
    monkeypatch.setattr(MetricWriter, "flush", lambda self: (done.append("flush"), flush(self)))
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a: (done.append("save"), save(self, *a)))
    monkeypatch.setattr(loop, "push_model", push)
    checkpoint = {"best": "reverse_kl", "export_best": True, "keep": 1, "push": "me/student"}
    train(config_of(models, tmp_path / "run", checkpoint=checkpoint))

    pushed = [x for x in done if x[0] == "push"]
    assert [x if isinstance(x, str) else x[0] for x in done] == [
        *("flush", "save", "push") * 2,
        *("flush", "save"),
    ]
    assert [x[1:3] for x in pushed] == [("me/student", True)] * 2
    assert "step 1: checkpoint.push: the network is down" in capsys.readouterr().err
    best = tmp_path / "run" / "best"
    assert export_run(tmp_path / "run", tmp_path / "out", best=True) == 2
    assert files(best) == files(tmp_path / "out") == pushed[1][3]
    assert pushed[0][3]["model.safetensors"] != pushed[1][3]["model.safetensors"]
    assert "after 2 steps" in (best / "README.md").read_text()
    assert load_model(best)[1] == load_model(models / "student")[1]
    assert [p.name for p in (tmp_path / "run").iterdir() if "best" in p.name] == ["best"]

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = read_rows(epath.Path(tmp_path / "run" / "metrics.jsonl"))
    assert summary["steps"] == 3
    for stage in ("rollout", "evaluation", "checkpoint", "export"):
        logged = sum(row.get(f"time/{stage}", 0.0) for row in rows)
        # the evaluation and the checkpoint of the last step come after its row
        assert summary["seconds"][stage] > logged or stage in ("rollout", "export")
        assert summary["seconds"][stage] == pytest.approx(logged, rel=0.01) or stage in ("evaluation", "checkpoint")


@pytest.mark.exhaustive
def test_a_kill_before_the_export_is_made_up_for(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", lambda *_: None)
    config = config_of(models, tmp_path / "run", steps=1)
    train(config)
    want = files(tmp_path / "run" / "best")
    shutil.rmtree(tmp_path / "run" / "best")
    (tmp_path / "run" / ".best-half").mkdir()
    (tmp_path / "run" / ".best-half" / "model.safetensors").write_text("half")
    train(config, resume=True)
    found = files(tmp_path / "run" / "best")
    assert found.keys() == want.keys()
    assert all(found[name] == want[name] for name in want.keys() - {"README.md"})
    assert not list((tmp_path / "run").glob(".best*"))


@pytest.mark.exhaustive
def test_killed_while_it_replaces_the_best(tmp_path: Path, models: Path) -> None:
    """A reader of ``best`` finds one model or the other: killed between the files, the old one stands untouched."""
    run = open_run(tmp_path / "run", dump_config(config_of(models, tmp_path / "run")), resume=False)
    params = tiny_runs.params_of(STUDENT, 0)
    export_best(run, params, STUDENT, str(models / "student"), 1)
    want = files(tmp_path / "run" / "best")
    program = (
        "import os, signal, sys, pathlib, shutil; import tiny_runs; from opd_jax.models import hf\n"
        "from opd_jax.checkpoints.export import export_best; from opd_jax.tracking.run_dir import existing_run\n"
        "hf._carry_tokenizer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "params = tiny_runs.params_of(tiny_runs.STUDENT, 1)\n"
        "export_best(existing_run(sys.argv[1]), params, tiny_runs.STUDENT, sys.argv[2], 2)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "run", models / "student"]
    assert subprocess.run(command, cwd=TESTS, capture_output=True).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run").glob(".best-*"))) == 1
    assert files(tmp_path / "run" / "best") == want
    params = jax.tree.map(lambda w: 2 * w, params)
    export_best(run, params, STUDENT, str(models / "student"), 3)
    np.testing.assert_array_equal(load_model(tmp_path / "run" / "best")[0]["norm"], params["norm"])
    assert not list((tmp_path / "run").glob(".best*"))


def test_in_a_store(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the model before had is gone; a row is there as soon as the writer is flushed."""
    store = fake_store.install(monkeypatch)
    run = open_run("gs://b/run", dump_config(config_of(models, tmp_path / "run")), resume=False)
    with MetricWriter(run) as writer:
        writer.write(1, {"loss": 2.0})
        assert not run.metrics.exists()
        writer.flush()
        assert read_rows(run.metrics) == [{"step": 1, "loss": 2.0}]
        for step in (1, 2):
            export_best(run, tiny_runs.params_of(STUDENT, step), STUDENT, str(models / "student"), step)
            (run.best / "stale").write_text("x")
        export_best(run, tiny_runs.params_of(STUDENT, 3), STUDENT, str(models / "student"), 3)
    assert store.written[-1].endswith("run/best/config.json")
    assert not (run.best / "stale").exists()
    np.testing.assert_array_equal(load_model("gs://b/run/best")[0]["embed"], tiny_runs.params_of(STUDENT, 3)["embed"])


def test_which_step_is_the_best_so_far(tmp_path: Path) -> None:
    """Not step 0, which has no checkpoint, nor what a run before a kill found later; of equals the first."""
    rows = [{"step": s, "who": "student", "reverse_kl": kl} for s, kl in ((0, 0.1), (2, 0.4), (4, 0.4), (8, 0.2))]
    checkpoints = Checkpoints(tmp_path, 1, "reverse_kl", [{"step": 0, "who": "teacher"}, *rows])
    assert [s for s in (0, 1, 2, 4, 8) if checkpoints.best_is(s)] == [2, 8]
    assert not Checkpoints(tmp_path, 1, None, rows).best_is(2)
    assert not Checkpoints(tmp_path, 1, "accuracy", rows).best_is(2)


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ({"export_best": True}, r"checkpoint: export_best=true needs best"),
        ({"best": "reverse_kl", "push": "me/student"}, r"checkpoint: push=me/student uploads what export_best writes"),
    ],
)
def test_settings_that_export_nothing(models: Path, tmp_path: Path, checkpoint: dict[str, Any], said: str) -> None:
    tree = config_of(models, tmp_path).model_dump(mode="json")
    with pytest.raises(InputError, match=said):
        parse_config(tree | {"checkpoint": checkpoint})


def test_what_cannot_be_pushed_is_refused_first(models: Path, tmp_path: Path) -> None:
    checkpoint = {"best": "reverse_kl", "export_best": True, "push": "a/b/c"}
    with pytest.raises(InputError, match=r"checkpoint\.push a/b/c: not a repository's name"):
        train(config_of(models, tmp_path / "run", checkpoint=checkpoint))
    config = config_of(models, tmp_path / "run", checkpoint=checkpoint | {"push": "me/student"})
    with pytest.raises(InputError, match=r"checkpoint\.push me/student: uploads a local directory"):
        train(config.model_copy(update={"run_dir": "gs://b/run"}))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_two_processes_export_what_one_does(tmp_path: Path) -> None:
    """Weights sharded over the processes: gathered by all, written by the first."""
    root = tiny_runs.write_models(tmp_path)
    program = root / "watched_opd"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(TESTS)!r})\n"
        "import test_hosts\ntest_hosts.watched_main()\n"
    )
    program.chmod(0o755)
    config = config_of(root, root / "two", steps=2, mesh={"data": 1, "fsdp": 8})
    code, out = test_hosts.finish(test_hosts.start(root, config, 2))
    assert code == 0, out
    step = export_run(root / "two", tmp_path / "out", best=True)
    assert step > 0
    assert files(root / "two" / "best") == files(tmp_path / "out")
