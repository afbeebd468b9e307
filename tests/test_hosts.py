"""Several processes: the same numbers as one, only their own rows, and an orderly end when one stops or is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

from opd_jax import hosts
from opd_jax.checkpoints.state import Checkpoints, abstract
from opd_jax.cli import main
from opd_jax.config import Config
from opd_jax.config_files import dump_config
from opd_jax.errors import InputError
from opd_jax.mesh import Layout
from opd_jax.sampling import scheduler
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training import setup
from opd_jax.training.loop import train

ROOT = Path(__file__).parents[1]
STEPS, ROWS = 4, 8
MESH = {"data": 8, "fsdp": 1, "tensor": 1}


def config_of(root: Path, name: str, evaluated: bool = False, **settings: Any) -> Config:
    data = {"source": str(root / "heldout.jsonl"), "chat": False, "max_prompt": 8}
    evaluation = {"data": data, "problems": 4, "samples": 2, "batch": 8} if evaluated else {}
    # Adam turns the rounding of a gradient near 0 into a step of ±lr, so a high rate would compare rounding
    common: dict[str, Any] = {"optimizer": {"lr": 3e-4}, "checkpoint": {"every": 2, "keep": 9}, "mesh": MESH}
    common |= {"steps": STEPS, "evaluation": evaluation} | settings
    return tiny_runs.run_config(root, root / name, "opd", **common)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models, prompts to evaluate on, and ``watched_opd``, the command that the processes run."""
    root = tiny_runs.write_models(tmp_path_factory.mktemp("hosts"))
    problems = [{"problem": f"{n} * 3 mod 5 ?", "answer": str(n * 3 % 5)} for n in (1, 2, 3, 4)]
    (root / "heldout.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    program = root / "watched_opd"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import test_hosts\ntest_hosts.watched_main()\n"
    )
    program.chmod(0o755)
    return root


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """A run by this process on its eight devices."""
    train(config_of(root, "one"))
    return root / "one"


def watched_main() -> None:
    """``opd`` in one of several processes, which notes the rows that it reads, and stops where WATCH says."""
    told = json.loads(os.environ["WATCH"])
    me = int(os.environ["OPD_PROCESS_ID"])
    read, tokens, inside = set(), set(), []
    put_rows, make_rollout, write = Layout.put_rows, scheduler.make_rollout, MetricWriter.write
    from_callback = jax.make_array_from_callback

    def make_array(shape: Any, sharding: Any, callback: Any) -> Any:
        def noted(index: Any) -> Any:
            if inside:
                read.update(range(*index[0].indices(shape[0])))
            return callback(index)

        return from_callback(shape, sharding, noted)

    def put(self: Layout, tree: Any) -> Any:
        inside.append(True)
        try:
            return put_rows(self, tree)
        finally:
            inside.pop()

    def make(*args: Any, **settings: Any) -> Any:
        rollout = make_rollout(*args, **settings)

        def noted(*args: Any) -> Any:
            rows = rollout(*args)
            assert np.all(rows.lengths > 0)
            tokens.update(np.flatnonzero(rows.entropy.any(1)).tolist())
            return rows

        return noted

    def write_and_stop(self: MetricWriter, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        Path(told["notes"], f"{me}.json").write_text(json.dumps([sorted(read), sorted(tokens)]))
        if [me, step] == told.get("at"):
            while not (Path(told["run"]) / "checkpoints" / str(step - step % 2)).is_dir() and step > 1:
                time.sleep(0.01)
            os.kill(os.getpid(), told["signal"])

    jax.make_array_from_callback, Layout.put_rows = make_array, put
    setup.make_rollout, MetricWriter.write = make, write_and_stop
    hosts.START_SECONDS = 60
    main()


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(
    root: Path, config: Config, processes: int, *options: str, at: tuple[int, int] | None = None, number: int = 0
) -> subprocess.Popen[str]:
    """``launch/local_processes.sh`` on eight devices; ``at``: (process, step) that sends itself signal ``number``."""
    name = Path(config.run_dir).name
    (root / f"{name}.yaml").write_text(dump_config(config))
    (root / f"{name}.notes").mkdir(exist_ok=True)
    watch = {"notes": str(root / f"{name}.notes"), "run": config.run_dir, "at": at, "signal": int(number)}
    cache = str(ROOT / ".cache" / "jax")
    environment = os.environ | {"OPD": str(root / "watched_opd"), "PORT": str(free_port()), "WATCH": json.dumps(watch)}
    environment |= {"TRANSFORMERS_VERBOSITY": "error"}  # as the command sets it, before anything is imported
    command = [ROOT / "launch/local_processes.sh", str(processes), str(8 // processes), root / f"{name}.yaml"]
    return subprocess.Popen(
        [*map(str, command), *options],
        env=environment | {"JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out = process.communicate(timeout=400)[0]
    return process.returncode, out


def rows(run: Path, log: str) -> list[dict[str, Any]]:
    """A log without what a clock writes and what depends on how the mesh cuts the rows."""
    parsed = [json.loads(line) for line in (run / f"{log}.jsonl").read_text().splitlines()]
    other = ("time/", "tokens_per_second", "padding", "rollouts")
    return [{k: v for k, v in row.items() if not k.startswith(other)} for row in parsed]


def assert_same_numbers(got: Path, want: Path) -> None:
    texts, wanted = rows(got, "samples"), rows(want, "samples")
    for a, b in zip(texts, wanted, strict=True):
        # written with four decimals, or three digits, of which rounding on another mesh may turn the last
        for name in ("kl_by_token", "logp", "logq"):
            np.testing.assert_allclose(a.pop(name, 0), b.pop(name, 0), rtol=1e-4, atol=2e-4, err_msg=name)
        for name in ("top_student", "top_teacher"):
            lists = [[[p for _, p in listed] for listed in row.pop(name, ())] for row in (a, b)]
            np.testing.assert_allclose(*lists, rtol=0.02, err_msg=name)
    assert texts == wanted
    assert len(rows(got, "metrics")) == STEPS
    for log in ("metrics", "evaluations"):
        pairs = list(zip(rows(got, log), rows(want, log), strict=True))
        for a, b in pairs:
            assert a.keys() == b.keys()
            for name, value in b.items():
                if isinstance(value, str) or value is None:
                    assert a[name] == value, name
                else:
                    x, y = (np.asarray(jax.tree.leaves(v), float) for v in (a[name], value))
                    np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6, err_msg=f"{log}: {name}")


def notes(root: Path, name: str) -> tuple[list[set[int]], list[set[int]]]:
    """(rows put on the mesh, rows with tokens), of each process."""
    read, tokens = zip(*(json.loads(p.read_text()) for p in sorted((root / f"{name}.notes").iterdir())), strict=True)
    return [set(r) for r in read], [set(t) for t in tokens]


@pytest.fixture(scope="module")
def two(root: Path) -> tuple[Path, str]:
    """(run directory, output) of the run ``one`` by two processes with four devices each."""
    config = config_of(root, "two")
    code, out = finish(start(root, config, 2))
    assert code == 0, out
    return Path(config.run_dir), out


@pytest.mark.exhaustive
def test_two_processes_give_the_numbers_of_one(one: Path, two: tuple[Path, str]) -> None:
    assert_same_numbers(two[0], one)
    assert json.loads((two[0] / "environment.json").read_text())[0]["process_count"] == 2
    assert (two[0] / "report.html").exists()


@pytest.mark.exhaustive
def test_each_process_touches_only_its_rows(root: Path, two: tuple[Path, str]) -> None:
    first, second = set(range(ROWS // 2)), set(range(ROWS // 2, ROWS))
    assert notes(root, "two") == ([first, second], [first, second])


@pytest.mark.exhaustive
def test_only_process_0_speaks(two: tuple[Path, str]) -> None:
    lines = two[1].splitlines()
    assert any(f"two  {STEPS}/{STEPS}" in line for line in lines)
    assert [line for line in lines if not line.startswith("[0] ")] == []
    assert "Gloo" not in two[1]


@pytest.fixture(scope="module")
def one_evaluated(root: Path) -> Path:
    train(config_of(root, "one_evaluated", evaluated=True))
    assert {row["who"] for row in rows(root / "one_evaluated", "evaluations")} == {"teacher", "student"}
    return root / "one_evaluated"


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "sizes"), [(2, (2, 2, 2)), (2, (8, 1, 1)), (2, (1, 8, 1)), (4, (2, 1, 4)), (2, (1, 1, 8))], ids=str
)
def test_evaluations_and_other_meshes(
    root: Path, one_evaluated: Path, processes: int, sizes: tuple[int, int, int]
) -> None:
    """Also where a row lies on several processes: (2, 1, 4) on four has each row on two."""
    name = f"mesh{processes}-{'-'.join(map(str, sizes))}"
    config = config_of(root, name, evaluated=True, mesh=dict(zip(MESH, sizes, strict=True)))
    code, out = finish(start(root, config, processes))
    assert code == 0, out
    assert_same_numbers(root / name, one_evaluated)
    shards = sizes[0] * sizes[1]
    read, tokens = notes(root, name)
    for i in range(processes):
        own = set(range(i * shards // processes * ROWS // shards, -(-(i + 1) * shards // processes) * ROWS // shards))
        assert read[i] == tokens[i] == own


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_and_the_restart_is_exact(root: Path, two: tuple[Path, str], lost: int) -> None:
    config = config_of(root, f"lost{lost}")
    run, begun = Path(config.run_dir), time.monotonic()
    process = start(root, config, 2, at=(lost, 3), number=signal.SIGKILL)
    while not (root / f"lost{lost}.notes" / f"{lost}.json").exists():
        assert process.poll() is None
        begun = time.monotonic()
        time.sleep(0.1)
    code, out = finish(process)
    assert code not in (0, 2, 3)
    assert time.monotonic() - begun < 120
    named = f"process {lost} of 2 was lost; the last checkpoint is step 2; start all processes again with --resume"
    assert [line for line in out.splitlines() if line.startswith(f"[{1 - lost}]") and "error" in line] == [
        f"[{1 - lost}] error: {named}"
    ]
    assert not any(word in out for word in ("Traceback", "stack trace", "coordination"))
    code, out = finish(start(root, config, 2, "--resume"))
    assert code == 0, out
    assert rows(run, "metrics") == rows(two[0], "metrics")
    jax.tree.map(np.testing.assert_array_equal, final_state(config), final_state(config_of(root, "two")))


def final_state(config: Config) -> Any:
    made = setup.prepare(config)
    found = Checkpoints(Path(config.run_dir) / "checkpoints", 9).restore(abstract(made.state, made.graphs.shardings))
    assert found is not None
    assert int(found[0].step) == STEPS
    return jax.device_get(found)


@pytest.mark.exhaustive
def test_sigterm_on_one_process_stops_all_with_one_checkpoint(root: Path) -> None:
    config = config_of(root, "stopped", checkpoint={"every": 50, "keep": 9})
    code, out = finish(start(root, config, 2, at=(1, 1), number=signal.SIGTERM))
    assert code == 3
    messages = sorted(line for line in out.splitlines() if "error" in line)
    assert messages == [f"[{i}] error: stopped after step 1 of {STEPS}; continue with --resume" for i in (0, 1)]
    assert [p.name for p in (root / "stopped" / "checkpoints").iterdir()] == ["1"]


@pytest.mark.exhaustive
def test_what_process_0_alone_refuses_ends_all(root: Path, two: tuple[Path, str]) -> None:
    code, out = finish(start(root, config_of(root, "two"), 2))
    assert code == 2
    mine, other = sorted(out.splitlines())
    assert mine.startswith(f"[0] error: {root}/two: the run directory is not empty")
    assert other.startswith(f"[1] error: process 0: {root}/two: the run directory is not empty")


JOIN = "from opd_jax import hosts; hosts.START_SECONDS = 6; from opd_jax.cli import main; main()"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({0: 3, 1: 3}, "ewer than 3 processes"),
        ({0: 2, 1: 3}, r"processes: given as [2, 3], but 2 joined"),
        ({1: 2}, "got no answer from the coordinator"),
    ],
    ids=["one is missing", "different numbers", "no coordinator"],
)
def test_processes_that_do_not_come_together(root: Path, counts: dict[int, int], said: str) -> None:
    (root / "join.yaml").write_text(dump_config(config_of(root, "join")))
    command = ["train", str(root / "join.yaml"), "--coordinator", f"127.0.0.1:{free_port()}"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, *command, "--processes", str(count), "--process-id", str(i)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, count in counts.items()
    ]
    for process in running:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 2, errors
        assert said in errors
        assert len(errors.splitlines()) == 1
    assert not (root / "join").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes", "2"], "--coordinator (or OPD_COORDINATOR) and --process-id (or OPD_PROCESS_ID) not given"),
        (["--coordinator", "a:1", "--processes", "2", "--process-id", "2"], "one of 0 … 1"),
        (["--coordinator", "a", "--processes", "2", "--process-id", "0"], "expected host:port"),
        (["--coordinator", "a:99999", "--processes", "2", "--process-id", "0"], "expected host:port"),
    ],
)
def test_bad_options(
    options: list[str], said: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "bad.yaml").write_text(dump_config(config_of(root, "bad")))
    monkeypatch.setattr(sys, "argv", ["opd", "train", str(root / "bad.yaml"), *options])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "kept as it is")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (root / "bad").exists()


def test_a_port_in_use_is_refused() -> None:
    """JAX crashes on one."""
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot listen on port \d+ \(Address already in use\)"):
            hosts.start(address, 2, 0)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # in an allocation, but not under srun
        (SLURM | {"SLURM_NTASKS": "4"}, {"cluster_detection_method": "slurm"}),
        (
            SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3]},
        ),
        (
            SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "3"},
            {"cluster_detection_method": "slurm", "local_device_ids": [0]},
        ),
        (
            SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            {"cluster_detection_method": "slurm"},  # JAX takes the one with the local index
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, {"cluster_detection_method": "ompi"}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"cluster_detection_method": "gketpu"}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {"cluster_detection_method": "gketpu"}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_what_a_scheduler_says(environment: dict[str, str], want: dict[str, Any] | None) -> None:
    assert hosts._cluster(environment) == want


def test_what_jax_says_of_lost_processes() -> None:
    native = hosts._Native()
    fatal = "JAX distributed service detected fatal errors. absl::Status: UNAVAILABLE: "
    native.started = (2, 8)
    assert native._verdict(fatal) == ("a process of 8 was lost; start all processes again", 1)  # nothing to resume yet
    native.progress = lambda: "the last checkpoint is step 4"
    end = " of 8 was lost; the last checkpoint is step 4; start all processes again with --resume"
    silent = "The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have crashed."
    assert native._verdict(fatal + silent) == ("process 1 and 3" + end, 1)
    leader = "Failed to send RPC to coordination service. Either the leader task was preempted"
    assert native._verdict(fatal + leader) == ("process 0" + end, 1)
    assert native._verdict(fatal + "some later wording") == ("a process" + end, 1)
    assert native._verdict("Check failed: a GPU") == ("", 1)  # not about processes: said as it is


def test_what_differs_between_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(mine: np.ndarray) -> np.ndarray:
        return np.array([mine, mine, mine ^ others])

    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    others = np.uint32(0)
    hosts.check_same("data.source=p.jsonl", "a")
    others = np.uint32(1)
    with pytest.raises(InputError, match=r"data\.source=p\.jsonl: not the same on process 2 as on process 0"):
        hosts.check_same("data.source=p.jsonl", "a")
