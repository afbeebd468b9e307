"""``opd demo``: a whole distillation from nothing, on a laptop, in minutes.

A student that has learnt the multiplication table badly and a teacher that has learnt it well are trained from scratch
side by side (SFT on chains of thought, ``data/tasks.py``); then the student samples its own answers and learns from the
teacher's full distribution on them (OPD, paper.md Eq. 4). The same code runs a real model on a pod.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from opd_jax.checkpoints.export import export_run
from opd_jax.config import Config
from opd_jax.config_files import parse_config
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.errors import InputError
from opd_jax.evaluation.scores import gap_recovery
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.console import console
from opd_jax.training.loop import train

TASK = "products-13x4"
PROMPT, RESPONSE = 10, 22  # tokens
Row = dict[str, Any]


def run_demo(out: Path, seed: int = 0, resume: bool = False, stop: threading.Event | None = None) -> Row:
    """Runs (or resumes) the demo below ``out``; returns accuracies, gap recovery rate and where the report lies.

    Raises:
        InputError: ``out`` holds an earlier demo and ``resume`` is not set, or the other way round.
        Interrupted: ``stop`` was set; continue with ``resume``.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: not a directory. Give another --out.")
    if out.exists() and any(out.iterdir()) and not resume:
        raise InputError(f"{out}: not empty. Go on with --resume, give another --out, or remove it.")
    if resume and not out.exists():
        raise InputError(f"{out}: no demo to resume. Start it without --resume.")
    with console.stage("1/2  student and teacher learn from texts (SFT), side by side"):
        makers = [("student", f"task:{TASK}-shaky", 2 * seed), ("teacher", f"task:{TASK}", 2 * seed + 1)]
        with ThreadPoolExecutor(len(makers)) as pool:
            for future in [pool.submit(_learn, out, *maker, stop) for maker in makers]:
                future.result()
    with console.stage("2/2  the student learns from the teacher on its own answers (OPD)"):
        config = distillation_config(out, seed)
        rows = train(config, resume=_started(config), title="distilling", stop=stop)
    return _summary(rows, config)


def default_directory(resume: bool) -> Path:
    """The first free one of runs/demo, runs/demo-2, …; to resume, the last one that exists."""
    last, free = None, Path("runs/demo")
    while free.exists():
        last, free = free, Path(f"runs/demo-{int(free.name.partition('-')[2] or 1) + 1}")
    return last if resume and last else free


def distillation_config(out: Path, seed: int) -> Config:
    """The distillation itself: full-vocabulary reverse KL, 64 fresh rollouts a step."""
    return parse_config(
        {
            "run_dir": str(out / "distil"),
            "seed": seed,
            "steps": 150,
            "student": {"path": str(out / "student")},
            "teacher": {"path": str(out / "teacher")},
            "objective": {"name": "full", "k": 4},
            "data": _data(f"task:{TASK}", "train"),
            "rollout": {"prompts": 64, "samples": 1, "max_response": RESPONSE},
            "optimizer": {"lr": 5e-4, "warmup": 5},
            "evaluation": {"data": _data(f"task:{TASK}", "test"), "problems": 512, "batch": 512, "every": 50},
            "checkpoint": {"every": 25},
            "dtype": "float32",
            "remat": "none",
        }
    )


def _data(source: str, split: str) -> Row:
    return {"source": source, "split": split, "chat": False, "max_prompt": PROMPT}


def _learn(out: Path, name: str, source: str, seed: int, stop: threading.Event | None) -> None:
    """One model from random weights to a Hugging Face directory ``out/name``; does what is not done yet."""
    if (out / name).exists():
        return
    start = out / f"{name}-init"
    if not start.exists():
        tokenizer = out / f"{name}-tokenizer"
        vocab_size = write_task_tokenizer(tokenizer, TASK)
        rows = -(-vocab_size // 8) * 8  # so that the head divides over a tensor axis
        network = DecoderConfig(
            "llama", rows, width=128, hidden=384, layers=2, heads=4, kv_heads=4, head_dim=32, norm_eps=1e-6,
            rope_theta=1e4, max_positions=64, tie_embeddings=True,
        )  # fmt: skip
        save_model(start, init_params(network, jax.random.key(seed)), network, tokenizer_from=tokenizer)
    config = parse_config(
        {
            "kind": "sft",
            "run_dir": str(out / f"{name}-sft"),
            "seed": seed,
            "steps": 300,
            "student": {"path": str(start)},
            "data": _data(source, "train") | {"response": "response"},
            "rollout": {"prompts": 64, "samples": 1, "max_response": RESPONSE},
            "optimizer": {"lr": 3e-3, "b2": 0.95, "schedule": "cosine", "warmup": 20},
            "checkpoint": {"every": 50},
            "dtype": "float32",
            "remat": "none",
        }
    )
    train(config, resume=_started(config), title=name, stop=stop)
    export_run(config.run_dir, out / name)


def _started(config: Config) -> bool:
    return (Path(config.run_dir) / "config.yaml").exists()


def _summary(rows: list[Row], config: Config) -> Row:
    student = [r for r in rows if r["who"] == "student"]
    teacher = next(r for r in rows if r["who"] == "teacher")
    before, after = student[0], student[-1]
    recovery = gap_recovery(before["accuracy"], after["accuracy"], teacher["accuracy"])
    columns = ["", "accuracy", "reverse KL", "overlap@4", "entropy gap", "length"]
    names = ["accuracy", "reverse_kl", "overlap_ratio", "entropy_gap", "response_length"]

    def cells(row: Row) -> list[Any]:
        return [(row[n], row.get(n + "_se")) if n in row else None for n in names]

    console.table(
        f"held-out problems ({before['problems']})",
        columns,
        [["student before", *cells(before)], ["student after", *cells(after)], ["teacher", *cells(teacher)]],
    )
    report = str(Path(config.run_dir) / "report.html")
    console.print(f"gap recovery rate {recovery:.3f}   report: {report}")
    return {"before": before, "after": after, "teacher": teacher, "gap_recovery": recovery, "report": report}
