"""What every objective teaches a tiny model, from random weights: SFT, GRPO, OPD, and the further forms of OPD.

    python benchmarks/learn.py --seeds 1              # resumable: what stands below --out is not done again
    python benchmarks/learn.py --only opd_full,mixed  # and what these need

Two layers of width 64 learn products of three numbers modulo 11 (``data/tasks.py``). ``start`` is the half-trained
model: it has imitated an author whose multiplication table is shaky, so no text it has seen tells the truth. Half of
its texts were given with their answer behind the problem, whatever answer the text arrived at: it has learnt to argue
for an answer that it is told. Every other experiment begins at ``start``, except those of SFT, which begin at random.
``grpo`` makes the teacher of ``opd_*`` and ``off_policy``; the teacher of ``told`` is ``start`` itself with the true
answer in its prompt (``told_ema``: an exponential mean of the student), and ``told`` is the weak teacher of ``mixed``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/opd-jax/jax").expanduser()))

import jax

from opd_jax.checkpoints.export import export_run
from opd_jax.config import Config
from opd_jax.config_files import parse_config, parse_data
from opd_jax.data.tasks import make_task, write_task_tokenizer
from opd_jax.evaluation.scores import gap_recovery
from opd_jax.generate import generate_file
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.sampling.law import Law
from opd_jax.tracking.console import console
from opd_jax.training.loop import train

Row = dict[str, Any]
TASK, OTHER = "products-11x3", "products-7x3"  # the words of the second are among those of the first
PROMPT, RESPONSE = 12, 16  # tokens; a prompt with its answer has 10
HELD_OUT = 512
TOLD = "{problem} Answer: {answer}"
RESULT = Path(__file__).parent / "results" / "learn.json"


def plain(task: str, split: str = "train", **settings: Any) -> Row:
    return {"source": f"task:{task}", "split": split, "chat": False, "max_prompt": PROMPT} | settings


def both(split: str, **settings: Any) -> Row:
    parts = {name: {"source": f"task:{task}", "split": split} | settings for name, task in
             (("first", TASK), ("second", OTHER))}  # fmt: skip
    return {"mix": parts, "chat": False, "max_prompt": PROMPT}


class Place:
    """The files of one seed."""

    def __init__(self, root: Path, seed: int):
        self.root, self.seed = root / f"seed{seed}", seed
        self.root.mkdir(parents=True, exist_ok=True)

    def model(self, name: str) -> str:
        return str(self.root / f"{name}-model")

    def prepare(self) -> None:
        """Random weights, and the texts that the half-trained model imitates when it is told the answer."""
        if not Path(self.model("random")).exists():
            tokenizer = self.root / "tokenizer"
            vocab_size = write_task_tokenizer(tokenizer, TASK)
            network = DecoderConfig(
                "llama", vocab_size, width=64, hidden=192, layers=2, heads=4, kv_heads=4, head_dim=16, norm_eps=1e-6,
                rope_theta=1e4, max_positions=64, tie_embeddings=True,
            )  # fmt: skip
            save_model(
                self.model("random"), init_params(network, jax.random.key(self.seed)), network, tokenizer_from=tokenizer
            )
        with (self.root / "told.jsonl").open("w") as file:
            for row in make_task(f"{TASK}-shaky", "train", 16_384, self.seed + 1000):
                arrived_at = row["response"].rpartition(" ")[2]
                problem = TOLD.format(problem=row["problem"], answer=arrived_at)
                file.write(json.dumps({"problem": problem, "response": row["response"]}) + "\n")

    def responses(self) -> str:
        """What the GRPO teacher answers to 1,024 training problems."""
        out = self.root / "teacher.jsonl"
        generate_file(
            Path(self.model("grpo")),
            parse_data(f"task:{TASK}", ("chat=false", f"max_prompt={PROMPT}", "limit=1024")),
            out,
            samples=1,
            problems=None,
            max_response=RESPONSE,
            law=Law(1.0),
            slots=256,
            seed=self.seed,
            dtype="float32",
            resume=out.exists(),
        )
        return str(out)


def sft(place: Place, data: Row, steps: int, lr: float = 3e-3, start: str = "random") -> Row:
    return {
        "kind": "sft",
        "steps": steps,
        "student": {"path": place.model(start)},
        "data": data,
        "rollout": {"prompts": 128, "samples": 1, "max_response": RESPONSE},
        "optimizer": {"lr": lr, "b2": 0.95, "schedule": "cosine", "warmup": 20},
    }


def start(place: Place) -> Row:
    """Measured on both tasks."""
    parts = {
        "plain": {"source": f"task:{TASK}-shaky"},
        "second": {"source": f"task:{OTHER}-shaky"},
        "told": {"source": str(place.root / "told.jsonl"), "weight": 2.0},
    }
    data = {"mix": parts, "chat": False, "max_prompt": PROMPT, "response": "response"}
    return sft(place, data, 450) | {"evaluation": held_out(both("test", limit=HELD_OUT // 2))}


def held_out(data: Row) -> Row:
    return {"data": data, "problems": HELD_OUT, "batch": HELD_OUT}


def grpo(place: Place) -> Row:
    return {
        "kind": "grpo",
        "steps": 120,
        "student": {"path": place.model("start")},
        "reward": {"terms": {"answer": 1.0}},
        "objective": {"k": 4, "correction": "tis"},
        "data": plain(TASK),
        "rollout": {"prompts": 32, "samples": 8, "max_response": RESPONSE},
        "optimizer": {"lr": 1e-3, "warmup": 5},
    }


def opd(place: Place, name: str = "full", **settings: Any) -> Row:
    return {
        "steps": 100,
        "student": {"path": place.model("start")},
        "teacher": {"path": place.model("grpo")},
        "objective": {"name": name, "k": 4},
        "data": plain(TASK),
        "rollout": {"prompts": 128, "samples": 1, "max_response": RESPONSE},
        "optimizer": {"lr": 1e-3, "warmup": 5},
    } | settings


def off_policy(place: Place) -> Row:
    """Half of each batch is responses of the teacher, whose scores are kept on disk."""
    data = plain(TASK) | {"source": place.responses(), "response": "response"}
    return opd(
        place,
        teacher={"path": place.model("grpo"), "cache": str(place.root / "scores")},
        off_policy={"fraction": 0.5, "data": data},
    )


def two_teachers(place: Place) -> Row:
    """Each has learnt one of the two tasks; measured on both."""
    teachers = {
        "teacher": {"path": place.model("sft"), "sources": ["first"]},
        "more_teachers": [{"path": place.model("sft_second"), "sources": ["second"]}],
    }
    evaluation = held_out(both("test", limit=HELD_OUT // 2))
    return opd(place, **teachers, data=both("train"), evaluation=evaluation)


def told(place: Place, steps: int = 200, **settings: Any) -> Row:
    """The student learns from itself, told the answer."""
    return opd(place, teacher={"path": place.model("start"), "context": TOLD} | settings, steps=steps)


def mixed(place: Place) -> Row:
    """The teacher is half as good as can be; the reward leads beyond it."""
    rollout = {"prompts": 32, "samples": 8, "max_response": RESPONSE}
    teacher = {"path": place.model("told")}
    return opd(place, teacher=teacher, reward={"terms": {"answer": 1.0}}, rollout=rollout)


def second(place: Place) -> Row:
    return sft(place, plain(OTHER, response="response"), 250) | {"evaluation": held_out(plain(OTHER, "test"))}


# name → (what must be there, settings)
EXPERIMENTS: dict[str, tuple[tuple[str, ...], Callable[[Place], Row]]] = {
    "sft": ((), lambda p: sft(p, plain(TASK, response="response"), 250)),
    "sft_second": ((), second),
    "start": ((), start),
    "grpo": (("start",), grpo),
    "opd_full": (("start", "grpo"), opd),
    "opd_topk": (("start", "grpo"), lambda p: opd(p, "topk")),
    "opd_sampled": (("start", "grpo"), lambda p: opd(p, "sampled")),
    "off_policy": (("start", "grpo"), off_policy),
    "two_teachers": (("start", "sft", "sft_second"), two_teachers),
    "told": (("start",), told),
    "mixed": (("start", "told"), mixed),
    "told_ema": (("start",), lambda p: told(p, 100, decay=0.99)),  # 0.95 collapses after some 100 steps
}
EXPORTED = {need for needs, _ in EXPERIMENTS.values() for need in needs}
GAP = {"opd_full": 0.9, "opd_topk": 0.9, "opd_sampled": 0.8}  # share of the way to the teacher that is to be closed


def config_of(name: str, place: Place) -> Config:
    common = {
        "run_dir": str(place.root / name),
        "seed": place.seed,
        "evaluation": held_out(plain(TASK, "test")),
        "checkpoint": {"every": 200, "keep": 1},
        "dtype": "float32",
        "remat": "none",
        "log_samples": 2,
    }
    return parse_config(common | EXPERIMENTS[name][1](place))


def measure(name: str, place: Place) -> Row:
    """Before, after, teacher, and what it cost; from its file where it has been done."""
    file = place.root / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())
    place.prepare()
    clock, cpu = time.perf_counter(), time.process_time()
    config = config_of(name, place)
    rows = train(config, resume=(Path(config.run_dir) / "config.yaml").exists(), title=f"{name} {place.seed}")
    if name in EXPORTED and not Path(place.model(name)).exists():
        export_run(config.run_dir, place.model(name))
    student = [row for row in rows if row["who"] == "student"]
    teacher = next((row["accuracy"] for row in rows if row["who"] == "teacher"), None)
    result: Row = {
        "before": student[0]["accuracy"],
        "after": student[-1]["accuracy"],
        "se": [student[i]["accuracy_se"] for i in (0, -1)],
        "teacher": teacher if name in GAP else None,  # elsewhere it is not what the student can reach
        "steps": config.steps,
        "seconds": time.perf_counter() - clock,
        "cpu_seconds": time.process_time() - cpu,
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def interval(values: Sequence[float], error: float) -> tuple[float, float]:
    """Mean and half its 95 % interval: Student's t over seeds; of a single seed, over its problems (``error``)."""
    n = len(values)
    if n == 1:
        return values[0], 1.96 * error
    return float(np.mean(values)), float(student_t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def summary(name: str, rows: list[Row]) -> Row:
    gains = [row["after"] - row["before"] for row in rows]
    gain, half = interval(gains, math.hypot(*rows[0]["se"]))
    out: Row = {name: [row[name] for row in rows] for name in ("before", "after", "teacher", "seconds", "cpu_seconds")}
    out |= {"gain": gain, "gain_half_interval": half, "steps": rows[0]["steps"]}
    if name in GAP:
        closed = [gap_recovery(row["before"], row["after"], row["teacher"]) for row in rows]
        error = math.hypot(*rows[0]["se"]) / abs(rows[0]["teacher"] - rows[0]["before"])
        out["closed"], out["closed_half_interval"] = interval(closed, error)
        out["target"], out["met"] = f"closes {GAP[name]:.0%}", out["closed"] >= GAP[name]
    elif name.startswith("sft"):
        out["target"], out["met"] = "95 %", float(np.mean(out["after"])) >= 0.95
    elif name == "grpo":
        out["target"], out["met"] = "+30 points", gain >= 0.3
    elif name != "start":
        out["target"], out["met"] = "gain beyond its interval", gain > half
    return out


def table(results: dict[str, Row]) -> None:
    def shown(name: str, row: Row) -> list[Any]:
        closed = f"{row['closed']:.0%} ± {row['closed_half_interval']:.0%}" if "closed" in row else None
        gain = f"{row['gain']:+.3f} ± {row['gain_half_interval']:.3f}"
        met = {True: "met", False: "MISSED", None: None}[row.get("met")]
        accuracies = [float(np.mean(row[n])) for n in ("before", "after")]
        cost = [f"{np.mean(row[n]):.0f}" for n in ("seconds", "cpu_seconds")]
        return [name, *accuracies, gain, closed, row.get("target"), met, *cost]

    columns = ["experiment", "before", "after", "gain", "gap closed", "target", "", "s", "CPU s"]
    console.table("learning", columns, [shown(name, row) for name, row in results.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="names of experiments, separated by commas", default=",".join(EXPERIMENTS))
    parser.add_argument("--out", type=Path, default=Path("runs/learn"), help="directory of the runs and their results")
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    while more := {need for name in wanted for need in EXPERIMENTS[name][0]} - wanted:
        wanted |= more
    results: dict[str, Row] = {}
    found: dict[str, list[Row]] = {name: [] for name in EXPERIMENTS if name in wanted}
    for seed in range(options.seeds):
        for name in found:
            found[name].append(measure(name, Place(options.out, seed)))
    results = {name: summary(name, rows) for name, rows in found.items()}
    table(results)
    total = {n: sum(sum(row[n]) for row in results.values()) for n in ("seconds", "cpu_seconds")}
    console.print(f"{options.seeds} seeds: {total['seconds']:.0f} s, {total['cpu_seconds']:.0f} CPU s")
    if wanted == set(EXPERIMENTS):
        RESULT.write_text(json.dumps({"seeds": options.seeds, "total": total, "experiments": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
