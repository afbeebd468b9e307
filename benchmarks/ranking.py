"""Does `opd diagnose` rank two teachers as on-policy distillation then turns out?

    python benchmarks/ranking.py --seeds 10

Tiny models multiply modulo 11. The student has learnt the table badly, working from left to right. Both teachers know
it: ``kin`` is the student, fine-tuned on right answers in its own pattern; ``stranger``, trained from random weights,
works from right to left. ``opd diagnose`` ranks them on the student's rollouts; then the student learns from each (full
reverse KL, same seed). The ranking is right where the teacher put first leaves the student more accurate.
Resumable: what stands below --out is not done again. One JSON row a seed in OUT/ranking.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax.analysis.diagnose import diagnose
from opd_jax.analysis.pair import Sampling
from opd_jax.checkpoints.export import export_run
from opd_jax.config_files import parse_config, parse_data
from opd_jax.data.tasks import make_task, write_task_tokenizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.console import console
from opd_jax.training.loop import train

Row = dict[str, Any]
TASK, PROMPT, RESPONSE = "products-11x3", 8, 16
TEACHERS = ("kin", "stranger")


def write_corpora(place: Path) -> None:
    """Worked answers: ``shaky`` and ``exact`` from left to right, ``reversed`` of mirrored problems."""
    for name, task, mirrored in (("shaky", f"{TASK}-shaky", False), ("exact", TASK, False), ("reversed", TASK, True)):
        rows = make_task(task, "train", 8192)
        if mirrored:
            for row in rows:
                row["problem"] = mirror(row["problem"])
            rows = [row for row in rows if zlib.crc32(row["problem"].encode()) % 8]  # no test problems
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mirror(problem: str) -> str:
    """7 * 4 * 9 mod 11 ? → 9 * 4 * 7 mod 11 ?"""
    numbers, modulus = problem.split(" mod ")
    return f"{' * '.join(reversed(numbers.split(' * ')))} mod {modulus}"


def learn(place: Path, name: str, corpus: str, start: Path, seed: int, steps: int) -> Path:
    """``place/name``: ``start`` fine-tuned on a corpus."""
    if not (place / name).exists():
        config = {
            "kind": "sft", "run_dir": str(place / f"{name}-sft"), "seed": seed, "steps": steps, "dtype": "float32",
            "remat": "none", "student": {"path": str(start)},
            "data": {"source": str(place / f"{corpus}.jsonl"), "response": "response", "chat": False,
                     "max_prompt": PROMPT},
            "rollout": {"prompts": 64, "samples": 1, "max_response": RESPONSE},
            "optimizer": {"lr": 3e-3, "b2": 0.95, "schedule": "cosine", "warmup": 10},
        }  # fmt: skip
        begun = (place / f"{name}-sft" / "config.yaml").exists()
        train(parse_config(config), resume=begun, title=name, report=False)
        export_run(place / f"{name}-sft", place / name)
    return place / name


def distil(place: Path, teacher: str, seed: int, steps: int) -> list[Row]:
    """Rows of evaluations of the student before and after it learnt from a teacher, and of the teacher."""
    data = {"source": f"task:{TASK}", "chat": False, "max_prompt": PROMPT}
    config = {
        "run_dir": str(place / f"opd-{teacher}"), "seed": seed, "steps": steps, "dtype": "float32", "remat": "none",
        "student": {"path": str(place / "student")}, "teacher": {"path": str(place / teacher)},
        "objective": {"name": "full", "k": 4}, "data": data | {"split": "train"},
        "rollout": {"prompts": 64, "samples": 1, "max_response": RESPONSE},
        "optimizer": {"lr": 5e-4, "warmup": 5}, "metrics_every": 10,
        "evaluation": {"data": data | {"split": "test"}, "problems": 512, "batch": 512, "every": steps},
    }  # fmt: skip
    return train(
        parse_config(config), resume=(place / f"opd-{teacher}" / "config.yaml").exists(), title=f"opd ← {teacher}",
        report=False,
    )  # fmt: skip


def run_seed(root: Path, seed: int, steps: int) -> Row:
    start, place = time.process_time(), root / f"seed{seed}"
    if not (place / "stranger-init").exists():
        place.mkdir(parents=True, exist_ok=True)
        write_corpora(place)
        size = write_task_tokenizer(place / "tokenizer", TASK)
        network = DecoderConfig(
            "llama", size, width=96, hidden=256, layers=2, heads=4, kv_heads=4, head_dim=24, norm_eps=1e-6,
            rope_theta=1e4, max_positions=64, tie_embeddings=True,
        )  # fmt: skip
        for i, name in enumerate(("student", "stranger")):
            if not (place / f"{name}-init").exists():
                params = init_params(network, jax.random.key(2 * seed + i))
                save_model(place / f"{name}-init", params, network, tokenizer_from=place / "tokenizer")
    student = learn(place, "student", "shaky", place / "student-init", seed, 200)
    learn(place, "kin", "exact", student, seed, 100)
    learn(place, "stranger", "reversed", place / "stranger-init", seed, 250)
    data = parse_data(f"task:{TASK}", ["split=test", "chat=false", f"max_prompt={PROMPT}"])
    sampling = Sampling(problems=64, samples=4, max_response=RESPONSE, seed=seed)
    found = diagnose(student, [place / name for name in TEACHERS], data, sampling, batch=256, dtype="float32")
    row: Row = {"seed": seed, "first": found["ranking"][0]}
    for t in found["teachers"]:
        name, update = t["name"], t["first_update"]
        rows = distil(place, name, seed, steps)
        own = [r for r in rows if r["who"] == "student"]
        row["before"] = own[0]["accuracy"]
        row[name] = {
            "accuracy": t["of_teacher"]["accuracy"],
            "after": own[-1]["accuracy"],
            "overlap_ratio": t["metrics"]["overlap_ratio"]["mean"],
            "overlap_mass_student": t["metrics"]["overlap_mass_student"]["mean"],
            "compatible": t["compatible"]["verdict"],
            "gradient_norm": update["norm"]["value"],
            "coherence": update["coherence"]["coherence"]["value"],
        }
    better = max(TEACHERS, key=lambda name: row[name]["after"])
    return row | {"better": better, "right": better == row["first"], "cpu_seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60, help="of each distillation")
    parser.add_argument("--out", type=Path, default=Path("runs/ranking"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = options.out / "ranking.jsonl"
    rows = [json.loads(line) for line in result.read_text().splitlines()] if result.exists() else []
    for seed in sorted({*range(options.seeds)} - {row["seed"] for row in rows}):
        with console.stage(f"seed {seed}"):
            rows.append(run_seed(options.out, seed, options.steps))
        result.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heads = ["seed", "put first", "better", "student", *(f"after {n}" for n in TEACHERS)]
    heads += [f"{what}, {n}" for what in ("overlap", "coherence") for n in TEACHERS]
    console.table(
        "ranked before, and how it turned out",
        heads,
        [
            [
                str(r["seed"]), r["first"], r["better"], r["before"], *(r[n]["after"] for n in TEACHERS),
                *(r[n][what] for what in ("overlap_ratio", "coherence") for n in TEACHERS),
            ]
            for r in rows
        ],
    )  # fmt: skip
    console.print(
        f"right in {sum(r['right'] for r in rows)} of {len(rows)} seeds; "
        f"{np.mean([r['cpu_seconds'] for r in rows]):.0f} s of CPU time a seed"
    )


if __name__ == "__main__":
    main()
