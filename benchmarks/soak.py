"""A tiny run of on-policy distillation, killed (SIGKILL) at random moments and resumed each time.

    python benchmarks/soak.py --json benchmarks/results/soak.json

A third of the kills come while a process starts, a third between two steps, a third while a checkpoint is written.
After each the logs must be whole but for a last line cut short, and the next process must go on from the last whole
checkpoint. The run that was killed must end like one that was not: parameters, optimizer, logs, kept checkpoints, bit
by bit. The run accumulates over passes, goes through its prompts many times, and keeps the best checkpoint beside the
last two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml

from opd_jax.config_files import load_config
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.console import Console
from opd_jax.tracking.run_dir import describe_environment

TASK, EVERY = "products-5x2", 5
MOMENTS = ("starting", "between steps", "saving")
CLOCKED = ("time/", "tokens_per_second", "mfu")
NETWORK = DecoderConfig(
    "llama", 24, width=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, tie_embeddings=True,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        result = soak(Path(directory), options.kills, options.seed)
    console.table("kills", list(result["kills"][0]), [list(row.values()) for row in result["kills"]])
    console.print(
        f"{len(result['kills'])} kills; at most {result['most steps lost']} steps lost, checkpoints every {EVERY}; "
        "ended bit by bit like the run that was not killed"
    )
    if options.json:
        environment = describe_environment()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(result | {n: environment[n] for n in ("python", "packages", "cpu")}, indent=2) + "\n"
        )


def soak(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Raises AssertionError where a kill left something behind that it must not."""
    rng = random.Random(seed)
    straight, killed = (write_run(root, name, steps=8 * kills) for name in ("straight", "killed"))
    begun = time.monotonic()
    first = start(straight)
    wait(first, lambda: rows_written(root / "straight") > 0)
    startup = time.monotonic() - begun
    assert first.wait() == 0, output(straight)
    step_seconds = (time.monotonic() - begun - startup) / (8 * kills)
    table, last = [], 0
    for i in range(kills):
        moment = MOMENTS[i % len(MOMENTS)]
        process = start(killed)
        kill(process, root / "killed", moment, rng, startup, step_seconds)
        resumed = re.search(r"resumed at step (\d+)", output(killed))
        assert resumed is None or int(resumed[1]) == last, f"went on from step {resumed[1]}, whole was {last}"
        last, logged = check(root / "killed", last)
        table.append({"kill": i + 1, "moment": moment, "logged": logged, "whole": last, "lost": logged - last})
    assert start(killed).wait() == 0, output(killed)
    compare(root / "straight", root / "killed")
    return {"kills": table, "most steps lost": max(row["lost"] for row in table), "steps": 8 * kills, "every": EVERY}


def write_run(root: Path, name: str, steps: int) -> Path:
    """The configuration of a run, its student and its teacher."""
    if not (root / "student").exists():
        write_task_tokenizer(root / "tokenizer", TASK)
        for i, model in enumerate(("student", "teacher")):
            params = jax.tree.map(lambda w: 2 * w, init_params(NETWORK, jax.random.key(i)))
            save_model(root / model, params, NETWORK, tokenizer_from=root / "tokenizer")
    data = {"source": f"task:{TASK}", "chat": False, "max_prompt": 8, "limit": 10}
    tree = {
        "run_dir": str(root / name),
        "steps": steps,
        "student": {"path": str(root / "student")},
        "teacher": {"path": str(root / "teacher")},
        "data": data,
        "rollout": {"prompts": 4, "samples": 2, "max_response": 10},
        "optimizer": {"lr": 3e-4},
        "evaluation": {"data": data | {"limit": 4}, "problems": 4, "batch": 4, "every": 2 * EVERY},
        "checkpoint": {"every": EVERY, "keep": 2, "best": "reverse_kl"},
        "pack": False,
        "micro_batch": 4,
        "dtype": "float32",
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name("opd"), "train", config, "--auto-resume"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache")}
    with config.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def output(config: Path) -> str:
    return config.with_suffix(".log").read_text(errors="replace")


def wait(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    while not ready() and process.poll() is None:
        time.sleep(0.001)


def kill(
    process: subprocess.Popen[bytes], run: Path, moment: str, rng: random.Random, startup: float, step: float
) -> None:
    """Waits for a random moment of that kind, and kills the process with all that it has started."""
    begun = time.time()
    until = begun + rng.uniform(0, startup) if moment == "starting" else math.inf
    wait(process, lambda: time.time() > until or running(run))
    if moment == "between steps":
        rows = rows_written(run) + rng.randrange(1, EVERY + 3)
        wait(process, lambda: rows_written(run) >= rows)
        time.sleep(rng.uniform(0, step))
    if moment == "saving":
        wait(process, lambda: saving(run, begun))
        time.sleep(rng.uniform(0, 0.15))  # about what a save takes
    assert process.poll() is None, f"ended by itself\n{run.with_suffix('.log').read_text(errors='replace')}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def running(run: Path) -> bool:
    text = run.with_suffix(".log").read_bytes()
    return b"resumed at" in text or (b"mesh" in text and rows_written(run) > 0)


def saving(run: Path, since: float) -> bool:
    with contextlib.suppress(FileNotFoundError):  # it has just become whole
        return any(p.stat().st_ctime > since for p in run.glob("checkpoints/*tmp*"))
    return False


def rows_written(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def check(run: Path, last: int) -> tuple[int, int]:
    """The last whole checkpoint and the last step logged; ``last``: what was whole before."""
    if not (run / "config.yaml").exists():
        return 0, 0
    load_config(run / "config.yaml")
    logs = {}
    for name in ("metrics", "evaluations", "samples"):
        log = run / f"{name}.jsonl"
        lines = log.read_text(errors="replace").split("\n")[:-1] if log.exists() else []
        logs[name] = [json.loads(line)["step"] for line in lines]
    logged = max(logs["metrics"], default=0)
    whole = max((int(p.name) for p in run.glob("checkpoints/*") if p.name.isdigit()), default=0)
    assert last <= whole <= logged, f"whole {whole}, before {last}, logged {logged}"
    return whole, logged


def compare(straight: Path, killed: Path) -> None:
    """Raises AssertionError unless two runs have left the same."""
    for log in ("metrics", "evaluations", "samples"):
        assert unclocked(straight / f"{log}.jsonl") == unclocked(killed / f"{log}.jsonl"), log
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (straight, killed)]
    assert names[0] == names[1], names
    read = ocp.StandardCheckpointer()
    for name in names[0]:
        states = [jax.device_get(read.restore(run / "checkpoints" / name / "state")) for run in (straight, killed)]
        jax.tree.map(np.testing.assert_array_equal, *states)
        positions = [(run / "checkpoints" / name / "position" / "metadata").read_text() for run in (straight, killed)]
        assert positions[0] == positions[1]


def unclocked(log: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


if __name__ == "__main__":
    main()
