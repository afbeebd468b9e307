"""Runs killed with SIGKILL and resumed end as if nothing had happened: weights, optimizer and logs, bit by bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

from opd_jax.checkpoints.state import Checkpoints, abstract
from opd_jax.config import Config
from opd_jax.config_files import parse_config
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError, Interrupted
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training import loop
from opd_jax.training.loop import train
from opd_jax.training.setup import prepare

ROOT = Path(__file__).parents[1]
# name → (kind, killed when metrics.jsonl shows this step, after this checkpoint was whole); checkpoints at 3, 6, 8, and
# for opd, which keeps the best, at the evaluated step 4
KILLED = {
    "opd_between_checkpoints": ("opd", 5, 4),
    "sft_while_saving": ("sft", 6, None),
    "sft_before_the_first_checkpoint": ("sft", 2, None),
}


def config_of(root: Path, name: str, kind: str, **settings: Any) -> Config:
    """Two passes of eight rows a step; ten prompts, through which eight steps go three times (sft: thirteen times)."""
    data = {"source": str(root / "heldout.jsonl"), "chat": False, "max_prompt": 8}
    common: dict[str, Any] = {"evaluation": {"data": data, "problems": 4, "samples": 2, "batch": 8, "every": 4}}
    common |= {"rollout": {"prompts": 4, "samples": 4, "max_response": 10}, "pack": False, "micro_batch": 8}
    common |= {"checkpoint": {"every": 3, "best": "reverse_kl" if kind == "opd" else None}, "log_samples": 1}
    tree = tiny_runs.run_config(root, root / name, kind, **common | settings).model_dump(mode="json")
    return parse_config(tree | {"data": tree["data"] | {"limit": 10}})


def run_and_die(config: Config, at_step: int, checkpoint: int | None) -> None:
    """Runs until metrics.jsonl shows ``at_step``, then sends itself the signal that cannot be handled."""
    write = MetricWriter.write

    def write_and_die(self: MetricWriter, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == at_step:
            while checkpoint and not (Path(config.run_dir) / "checkpoints" / str(checkpoint)).is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    MetricWriter.write = write_and_die
    train(config)


def run_all_and_die(root: Path) -> None:
    """In a process of its own: one fork per run (imports are paid once, JAX starts its devices after the fork)."""
    children = []
    load_tokenizer(str(root / "student"))  # transformers imports lazily
    for name, (kind, *when) in KILLED.items():
        if (pid := os.fork()) == 0:
            run_and_die(config_of(root, name, kind), *when)
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [-signal.SIGKILL] * len(children)


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed runs of the tiny models, and beside them ``opd`` and ``sft``, which nobody interrupted."""
    root = tiny_runs.write_models(tmp_path_factory.mktemp("runs"))
    # without answers: starting math-verify would take longer than the runs
    problems = [{"problem": f"{n} * 3 mod 5 ?"} for n in (1, 2, 3, 4)]
    (root / "heldout.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    for kind in ("opd", "sft"):
        train(config_of(root, kind, kind))
    program = "import sys, pathlib, conftest, test_training_resume as t; t.run_all_and_die(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


def rows(run: Path, log: str) -> list[dict[str, Any]]:
    """A log without what a clock writes."""
    parsed = [json.loads(line) for line in (run / f"{log}.jsonl").read_text().splitlines()]
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in parsed]


def final_state(config: Config) -> tuple[Any, Any]:
    setup = prepare(config)
    found = Checkpoints(Path(config.run_dir) / "checkpoints", 1).restore(abstract(setup.state, setup.graphs.shardings))
    assert found is not None
    return jax.device_get(found[0]), found[1]


def assert_same_run(root: Path, name: str, kind: str) -> None:
    for log in ("metrics", "evaluations", "samples"):
        got, want = rows(root / name, log), rows(root / kind, log)
        assert got == want, log
    assert [row["step"] for row in rows(root / name, "metrics")] == list(range(1, 9))
    steps = [(row["step"], row["who"]) for row in rows(root / name, "evaluations")]
    assert steps == [(0, "teacher")] * (kind == "opd") + [(0, "student"), (4, "student"), (8, "student")]
    (got, got_position), (want, want_position) = (final_state(config_of(root, n, kind)) for n in (name, kind))
    assert int(want.step) == 8
    assert got_position == want_position
    jax.tree.map(np.testing.assert_array_equal, got, want)
    kept, of_straight = (sorted(p.name for p in (root / n / "checkpoints").iterdir()) for n in (name, kind))
    assert kept == of_straight


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_ends_like_one_that_was_not(root: Path, name: str) -> None:
    kind, killed_at, checkpoint = KILLED[name]
    left = rows(root / name, "metrics")
    assert [row["step"] for row in left] == list(range(1, killed_at + 1))
    whole = {p.name for p in (root / name / "checkpoints").iterdir() if p.name.isdigit()}
    assert checkpoint is None or max(whole, key=int) == str(checkpoint)
    assert killed_at > 3 or not whole
    train(config_of(root, name, kind), resume=True)
    assert_same_run(root, name, kind)
    assert len(json.loads((root / name / "environment.json").read_text())) == 2


def test_a_run_that_is_asked_to_stop_saves_and_continues(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two checkpoints, without waiting for the next."""
    stop, write = threading.Event(), MetricWriter.write

    def write_and_stop(self: MetricWriter, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == 4:
            stop.set()

    monkeypatch.setattr(MetricWriter, "write", write_and_stop)
    config = config_of(root, "stopped", "sft")
    with pytest.raises(Interrupted, match="after step 4 of 8"):
        train(config, stop=stop)
    assert (root / "stopped" / "checkpoints" / "4").is_dir()
    monkeypatch.undo()
    train(config, resume=True)
    assert_same_run(root, "stopped", "sft")


def test_another_configuration_is_refused(root: Path) -> None:
    before = {p: p.read_bytes() for p in (root / "sft").glob("*.*")}
    with pytest.raises(InputError, match=r"optimizer.lr: the run has 0.003, now 0.001"):
        train(config_of(root, "sft", "sft", optimizer={"lr": 1e-3, "warmup": 2, "schedule": "cosine"}), resume=True)
    with pytest.raises(InputError, match="not empty"):
        train(config_of(root, "sft", "sft"))
    with pytest.raises(InputError, match="no run to resume"):
        train(config_of(root, "never_started", "sft"), resume=True)
    assert {p: p.read_bytes() for p in (root / "sft").glob("*.*")} == before
    assert not (root / "never_started").exists()


@pytest.mark.long
def test_kills_at_random_moments() -> None:
    """``benchmarks/soak.py`` with three kills: while starting, between steps, while saving."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/soak.py", "--kills", "3", "--seed", str(random.randrange(1000))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.args, done.stderr)
    assert "ended bit by bit like the run that was not killed" in done.stdout
