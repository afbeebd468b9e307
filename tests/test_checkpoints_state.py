"""Checkpoints: what is damaged is named, skipped and kept apart, what does not fit refused, the best kept, a full disk
named; nothing that was whole is lost."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny_runs

from opd_jax import hosts
from opd_jax.checkpoints.export import export_run
from opd_jax.checkpoints.state import Checkpoints, abstract, best_of, refused_writes
from opd_jax.config import Config
from opd_jax.config_files import dump_config, parse_config
from opd_jax.errors import InputError
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.hf import load_model
from opd_jax.training.loop import train
from opd_jax.training.state import TrainState, create_state

STEPS = (2, 4)


def state_of(step: int, width: int = 48, moments: Any = jnp.float32) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"embed": rng.normal(size=(64, width)).astype(np.float32), "norm": {"scale": np.ones(300, np.float32)}}
    made = create_state(jax.device_put(params), optax.adamw(1e-3, mu_dtype=moments))
    return made.replace(step=jnp.int32(step))  # pyright: ignore[reportAttributeAccessIssue]


def like(**changes: Any) -> Any:
    state = state_of(0, **changes)
    return abstract(state, jax.tree.map(lambda x: x.sharding, state))


def save(directory: Path, *steps: int, keep: int = 9, **settings: Any) -> None:
    checkpoints = Checkpoints(directory, keep, **settings)
    for step in steps:
        checkpoints.save(step, state_of(step), {"data": {"next": 7 * step}, "skipped_in_a_row": 0})
    checkpoints.close()


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()}


def content(directory: Path) -> dict[Path, bytes]:
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save(directory, *STEPS)
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restored(directory: Path, step: int) -> None:
    """Asserts that this is what comes back, every bit of it."""
    found = Checkpoints(directory, 9).restore(like())
    assert found is not None
    state, position = found
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(state_of(step)))
    assert position == {"data": {"next": 7 * step}, "skipped_in_a_row": 0}


def largest(step: Path) -> Path:
    """The file with the arrays."""
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x55
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "arrays cut short": lambda s: os.truncate(largest(s), largest(s).stat().st_size // 2),
    "arrays missing": lambda s: largest(s).unlink(),
    "arrays empty": lambda s: os.truncate(largest(s), 0),
    "arrays overwritten": lambda s: largest(s).write_bytes(bytes(largest(s).stat().st_size)),
    "one bit": lambda s: flip(largest(s)),
    "an empty directory": lambda s: (shutil.rmtree(s), s.mkdir()),
    "no state": lambda s: shutil.rmtree(s / "state"),
    "no position": lambda s: shutil.rmtree(s / "position"),
    "garbage as metadata": lambda s: (s / "state/_METADATA").write_bytes(os.urandom(999)),
    "no metadata": lambda s: (s / "state/_METADATA").unlink(),
    "no manifest": lambda s: (s / "state/manifest.ocdbt").unlink(),
    "garbage as position": lambda s: (s / "position/metadata").write_text("{}{"),
    "another position": lambda s: (s / "position/metadata").write_text(
        (s / "position/metadata").read_text().replace("28", "29")
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped(
    run: Path, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    DAMAGE[kind](run / "4")
    damaged = content(run / "4")
    restored(run, 2)
    errors = capfd.readouterr().err
    said = " ".join(errors.split())
    assert f"{run}/4: damaged (" in said
    assert f"{run}/4: moved to damaged-4" in said
    gc.collect()
    assert not noise
    assert "Traceback" not in errors
    assert names(run) == {"2", "damaged-4"}
    assert content(run / "damaged-4") == damaged
    save(run, 4)  # the step is free again
    restored(run, 4)


def test_every_file_that_counts_is_checked(saved: Path, tmp_path: Path) -> None:
    """Whichever file is cut short: what comes back is what was saved at that step, or the checkpoint before."""
    files = sorted(content(saved / "4"))
    came_back = []
    for i, name in enumerate(files):
        run = Path(shutil.copytree(saved, tmp_path / str(i)))
        os.truncate(run / "4" / name, (run / "4" / name).stat().st_size // 2)
        found = Checkpoints(run, 9).restore(like())
        assert found is not None
        step = int(found[0].step)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[0]), jax.device_get(state_of(step)))
        came_back.append(step)
    assert came_back.count(2) >= 4  # position, metadata, manifest, arrays
    assert set(came_back) <= {*STEPS}


def test_one_that_was_damaged_before_keeps_its_name(run: Path) -> None:
    DAMAGE["no state"](run / "4")
    restored(run, 2)
    save(run, 4)
    DAMAGE["no position"](run / "4")
    restored(run, 2)
    assert names(run) == {"2", "damaged-4", "damaged-4'"}


def test_when_all_are_damaged_nothing_is_done(run: Path) -> None:
    for step in STEPS:
        DAMAGE["arrays cut short"](run / str(step))
    before = content(run)
    with pytest.raises(InputError, match=r"all checkpoints are damaged.*delete this directory"):
        Checkpoints(run, 9).restore(like())
    assert content(run) == before
    assert Checkpoints(run.with_name("none"), 9).restore(like()) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 32}, r"\['embed'\] is float32 \[64, 48\] in the checkpoint, float32 \[64, 32\] in this run"),
        ({"moments": jnp.bfloat16}, r"mu\['embed'\] is float32 \[64, 48\] in the checkpoint, bfloat16"),
    ],
)
def test_of_another_model_or_optimizer_is_refused(run: Path, changes: dict[str, Any], named: str) -> None:
    before = content(run)
    with pytest.raises(InputError, match=r"4: belongs to another model or optimizer: .*" + named):
        Checkpoints(run, 9).restore(like(**changes))
    adam = state_of(0)
    sgd = abstract(adam.replace(opt_state=()), jax.tree.map(lambda x: x.sharding, adam.replace(opt_state=())))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"belongs to another.*opt_state.* absent in this run"):
        Checkpoints(run, 9).restore(sgd)
    assert content(run) == before


def test_what_cannot_be_read_now_is_not_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (PermissionError(13, "Permission denied"), ValueError("UNAVAILABLE: no route to the store")):
        restore = Mock(side_effect=error)
        monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", restore)
        with pytest.raises(InputError, match=r"4: cannot be read now \(.*(Permission denied|no route)"):
            Checkpoints(run, 9).restore(like())
    assert names(run) == {"2", "4"}


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    """Divergences: the least is best; of equals the first; what is not finite or was not measured is never best."""
    kls = {1: 0.9, 2: 0.3, 3: float("nan"), 4: 0.3, 5: None, 6: 0.5, 7: 0.2, 8: 0.4}
    want = {1: {1}, 2: {1, 2}, 3: {2, 3}, 4: {2, 3, 4}, 5: {2, 4, 5}, 6: {2, 5, 6}, 7: {6, 7}, 8: {7, 8}}
    checkpoints = Checkpoints(tmp_path, 2, "reverse_kl")
    for step, kl in kls.items():
        row = {} if kl is None else {"who": "student", "reverse_kl": kl}
        checkpoints.save(step, state_of(step), {}, row)
        checkpoints._wait()
        assert names(tmp_path) == {str(s) for s in want[step] | {step - 1} - {0}}, step
    checkpoints.close()
    # a run that is resumed knows what was best from its log
    rows = [{"step": s, "who": "student", "reverse_kl": kl} for s, kl in kls.items()]
    later = Checkpoints(tmp_path, 1, "reverse_kl", rows)
    later.save(9, state_of(9), {}, {"who": "student", "reverse_kl": 0.25})
    later.close()
    assert names(tmp_path) == {"7", "9"}


def test_best_of() -> None:
    rows = [{"step": 0, "who": "teacher", "accuracy": 1.0}]
    rows += [{"step": s, "who": "student", "accuracy": a} for s, a in ((0, 0.9), (5, 0.2), (10, 0.4), (15, 0.4))]
    assert best_of(rows, "accuracy", [5, 10, 15]) == 10
    assert best_of(rows, "accuracy", [5, 15]) == 15
    assert best_of(rows, "accuracy", [7]) is None
    assert best_of(rows, "reverse_kl", [5, 10]) is None
    rows = [{"step": s, "who": "student", "reverse_kl": kl} for s, kl in ((5, 0.2), (10, 0.4))]
    assert best_of(rows, "reverse_kl", [5, 10]) == 5


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``full_disk(bytes)``: no file can grow beyond; the kernel's limit, so that all libraries meet it."""
    # A manager that an earlier test left open would make every save wait, and raise at once.
    monkeypatch.setattr("opd_jax.checkpoints.state._managers", weakref.WeakSet())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, full_disk: Any) -> None:
    save(tmp_path, 2)
    before = content(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, 1)
    full_disk(1000)
    checkpoints.save(4, state_of(4), {"data": {"next": 28}, "skipped_in_a_row": 0})
    with pytest.raises(InputError, match=r"cannot be written \(File too large\).*the last checkpoint is step 2"):
        checkpoints.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert content(tmp_path / "2") == before
    restored(tmp_path, 2)
    save(tmp_path, 6, keep=1)
    restored(tmp_path, 6)
    assert names(tmp_path) == {"6"}  # nor is there what was half-written


def test_a_failed_write_is_told_at_the_next_step(tmp_path: Path, full_disk: Any) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    full_disk(1000)
    checkpoints.save(4, state_of(4), {})
    while checkpoints._manager.is_saving_in_progress():
        time.sleep(0.01)
    with pytest.raises(InputError, match=r"cannot be written .*there is no checkpoint yet"):
        checkpoints.check()


def test_writes_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/checkpoints: cannot be written \(Not a directory\)"):
        Checkpoints(tmp_path / "file" / "checkpoints", 1)
    with (
        pytest.raises(InputError, match=r"run: cannot be written \(No space left on device\).*--resume"),
        refused_writes("run"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match=r"Read-only"), refused_writes("run"):
        raise ValueError("FAILED_PRECONDITION: mkdir [OS error 30: EROFS Read-only file system]")
    with pytest.raises(ValueError, match="a defect"), refused_writes("run"):
        raise ValueError("a defect")


def test_the_sums_do_not_depend_on_the_mesh(run: Path) -> None:
    """Eight devices restore what one has saved, and find it undamaged; not the other way round, where it is."""
    layout = Layout(make_mesh(4, 2))
    whole, rows = layout.sharding(), layout.sharding(("batch", None))
    shardings = jax.tree.map(lambda x: rows if x.ndim == 2 else whole, like())
    found = Checkpoints(run, 9).restore(abstract(like(), shardings))
    assert found is not None
    assert found[0].params["embed"].sharding == rows
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[0]), jax.device_get(state_of(4)))
    flip(largest(run / "4"))
    found = Checkpoints(run, 9).restore(abstract(like(), shardings))
    assert found is not None
    assert int(found[0].step) == 2


def evaluated(models: Path, run_dir: Path, **changes: Any) -> Config:
    data = {"source": f"task:{tiny_runs.TASK}", "chat": False, "max_prompt": 8, "limit": 4}
    settings: dict[str, Any] = {"evaluation": {"data": data, "every": 2}, "checkpoint": {"best": "reverse_kl"}}
    return tiny_runs.run_config(models, run_dir, "opd", **settings | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


def test_the_best_is_exported(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = evaluated(models, run)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    rows = [{"step": s, "who": "student", "reverse_kl": kl} for s, kl in ((0, 0.05), (2, 0.1), (4, 0.2), (5, 0.3))]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoints = Checkpoints(run / "checkpoints", 1, config.checkpoint.best)
    for row in rows[1:]:
        params = jax.tree.map(lambda w, step=row["step"]: w + step, tiny_runs.params_of(tiny_runs.STUDENT, 0))
        checkpoints.save(row["step"], create_state(params, optax.sgd(1e-3)), {}, row)
    checkpoints.close()
    assert names(run / "checkpoints") == {"2", "5"}
    assert export_run(run, tmp_path / "last") == 5
    assert export_run(run, tmp_path / "best", best=True) == 2
    norms = [np.asarray(load_model(tmp_path / name)[0]["norm"]) for name in ("last", "best")]
    np.testing.assert_allclose(norms[0] - norms[1], 3)
    os.truncate(largest(run / "checkpoints" / "5"), 99)
    with pytest.raises(InputError, match=r"checkpoints/5: cannot be read.*--resume skips it"):
        export_run(run, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    (run / "evaluations.jsonl").write_text("")
    with pytest.raises(InputError, match=r"no checkpoint has been evaluated"):
        export_run(run, tmp_path / "damaged", best=True)
    (run / "config.yaml").write_text(dump_config(config).replace("best: reverse_kl", "best: null"))
    with pytest.raises(InputError, match=r"checkpoint\.best is not set"):
        export_run(run, tmp_path / "damaged", best=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluation": {}}, r"checkpoint\.best=reverse_kl compares evaluations; set evaluation\.data"),
        ({"checkpoint": {"best": "loss"}}, r"checkpoint\.best"),
        (
            {"kind": "sft", "teacher": None, "data": {"source": "x", "response": "y"}},
            r"which kind=sft does not measure; set checkpoint\.best=accuracy",
        ),
    ],
)
def test_settings_that_name_no_best(models: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    tree = evaluated(models, tmp_path).model_dump(mode="json")
    with pytest.raises(InputError, match=said):
        parse_config(tree | settings)


def test_accuracy_needs_answers(models: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{n} * 3 mod 5 ?"}) + "\n" for n in (1, 2, 3, 4)))
    data = {"source": str(problems), "chat": False, "max_prompt": 8}
    settings: dict[str, Any] = {"evaluation": {"data": data, "every": 2}, "checkpoint": {"best": "accuracy"}}
    with pytest.raises(InputError, match=r"best=accuracy: .*problems\.jsonl has problems without an answer"):
        train(evaluated(models, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


# 60,000 bytes: only the arrays of a checkpoint are larger
FULL = (
    "import resource, sys; from opd_jax.checkpoints.state import Checkpoints; save = Checkpoints.save\n"
    "def full(self, step, *rest):\n"
    "    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n"
    "    save(self, step, *rest)\n"
    "Checkpoints.save = full if 'full' in sys.argv else save\n"
    "sys.argv = ['opd', *[a for a in sys.argv[1:] if a != 'full']]\n"
    "from opd_jax.cli import main; main()"
)


@pytest.mark.exhaustive
def test_a_run_on_a_full_disk_ends_with_one_message(models: Path, tmp_path: Path) -> None:
    """The command, in a process of its own: exit code 2, no traceback, and --resume once there is space."""
    config = tiny_runs.run_config(models, tmp_path / "run", checkpoint={"every": 2, "keep": 1}, log_samples=0)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FULL, "train", str(tmp_path / "run.yaml")]
    done = subprocess.run([*command, "full"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (message,) = done.stderr.splitlines()
    assert "cannot be written (File too large). Free space" in message
    assert "the last checkpoint is step 2" in message
    assert names(tmp_path / "run" / "checkpoints") >= {"2"}
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stdout
    assert names(tmp_path / "run" / "checkpoints") == {"8"}


def one_of_two(directory: Path) -> None:
    """In each of two processes: saves, and restores where the second cannot read its part of step 4."""
    hosts.start()
    rows, whole = (Layout(make_mesh()).sharding(axes) for axes in (("batch", None), ()))
    shardings = jax.tree.map(lambda x: rows if x.ndim == 2 else whole, like())
    checkpoints = Checkpoints(directory, 9)
    for step in STEPS:
        # a jitted copy, since no process can put an array on the devices of both
        state = jax.jit(lambda state: state, out_shardings=shardings)(jax.device_get(state_of(step)))
        checkpoints.save(step, state, {"next": step})
    checkpoints.close()
    read = ocp.StandardCheckpointHandler.restore

    def restore(self: Any, path: Any, **arguments: Any) -> Any:
        if jax.process_index() == 1 and path.parent.name == "4":
            raise ValueError("DATA_LOSS: a shard")
        return read(self, path, **arguments)

    ocp.StandardCheckpointHandler.restore = restore  # pyright: ignore[reportAttributeAccessIssue]
    found = Checkpoints(directory, 9).restore(abstract(like(), shardings))
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, hosts.fetch(found[0]), jax.device_get(state_of(2)))
    assert found[1] == {"next": 2}


@pytest.mark.exhaustive
def test_processes_skip_the_same(tmp_path: Path) -> None:
    """What one of two processes cannot read, both skip; it is moved aside once."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    program = "import sys, pathlib, conftest, test_checkpoints_state as t; t.one_of_two(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"OPD_COORDINATOR": f"127.0.0.1:{port}", "OPD_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=Path(__file__).parent,
            env=environment | {"OPD_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [" ".join(process.communicate(timeout=200)[1].split()) for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert f"{tmp_path}/4: damaged (on another process); skipped" in errors[0]
    assert f"{tmp_path}/4: damaged (DATA_LOSS: a shard); skipped" in errors[1]
    assert sum("moved to damaged-4" in text for text in errors) == 1
    assert names(tmp_path) == {"2", "damaged-4"}


def test_two_runs_in_threads_save_at_once(tmp_path: Path) -> None:
    """As the demo does. Orbax by itself waits for ever; the threads are daemons, so that a failure ends."""
    checkpoints = [Checkpoints(tmp_path / str(i), keep=1) for i in range(2)]
    together, state = threading.Barrier(2), {"w": jnp.ones((64, 64))}

    def run(mine: Checkpoints) -> None:
        for step in range(1, 7):
            together.wait()
            mine.save(step, state, {})
        mine.close()

    threads = [threading.Thread(target=run, args=(mine,), daemon=True) for mine in checkpoints]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert [sorted(p.name for p in (tmp_path / str(i)).iterdir()) for i in range(2)] == [["6"], ["6"]]
