"""Run directories without a run: logs of as many steps as wanted, from closed forms and a seeded generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.config_files import dump_config, parse_config
from opd_jax.tracking.run_dir import RunDir, open_run
from opd_jax.tracking.writers import MetricWriter

BINS = 16
HOSTILE = "</pre><script>alert(1)</script><img src='http://evil.example/x.png' onerror=alert(1)>"


def metrics_at(step: int, share: float, rng: np.random.Generator | None, fails: bool = False) -> dict[str, Any]:
    """A step's row. ``share``: of the run; ``rng``: None for no noise; ``fails``: nothing moves."""
    noise = lambda size: float(rng.normal(0, size)) if rng else 0.0  # noqa: E731
    done = 0.0 if fails else 1 - np.exp(-4 * share)
    depth = np.linspace(0, 1, BINS)
    kl = 0.45 - 0.4 * done
    row = {
        "loss": kl + noise(0.02),
        "reverse_kl": kl + noise(0.02),
        "overlap_ratio": 0.72 + 0.19 * done + noise(0.01),
        "entropy_gap": 0.5 - 0.4 * done + noise(0.02),
        "overlap_advantage": -0.02 + 0.018 * done + noise(0.001),
        "overlap_mass_student": 0.97 + 0.02 * done + noise(0.001),
        "overlap_mass_teacher": 0.96 + 0.03 * done + noise(0.001),
        "student_entropy": 0.9 - 0.3 * done + noise(0.02),
        "teacher_entropy": 0.6 + noise(0.02),
        "gradient_norm": 0.2 + (0.0 if fails else 1.5 * (1 - done)) + abs(noise(0.03)),
        "response_length": 900 + 300 * done + noise(20),
        "truncation_rate": 0.1,
        "learning_rate": 1e-6,
        "tokens_per_second": 2000.0,
        "time/rollout": 3.0,
        "time/score": 0.5,
        "time/update": 1.0 if step > 1 else 20.0,
    }
    curves = {"student_entropy": 0.6 + 0.5 * depth * (1 - done), "reverse_kl": kl * (0.7 + 0.6 * depth)}
    return row | {f"{n}_by_position": [float(x) + noise(0.02) for x in curve] for n, curve in curves.items()}


def make_run(path: Path, steps: int = 200, fails: bool = False, samples: bool = True, **settings: Any) -> RunDir:
    """Responses of at most 1,024 tokens, an evaluation every 50 steps, and as many samples as a report shows."""
    tree: dict[str, Any] = {
        "run_dir": str(path), "steps": steps, "student": {"path": "models/s"}, "teacher": {"path": "models/t"},
        "data": {"source": "task:products"}, "rollout": {"max_response": 1024}, **settings,
    }  # fmt: skip
    run = open_run(path, dump_config(parse_config(tree)), resume=False)
    rng = np.random.default_rng(len(path.name))
    with MetricWriter(run) as writer:
        writer.write_evaluation(0, {"who": "teacher", "accuracy": 0.8, "accuracy_se": 0.02})
        for step in range(steps + 1):
            row = metrics_at(step, step / steps, rng, fails)
            if step:
                writer.write(step, row)
            if step % 50 == 0 or step == steps:
                names = ("reverse_kl", "overlap_ratio", "entropy_gap", "overlap_advantage", "student_entropy")
                exact = metrics_at(step, step / steps, None, fails)
                held_out = {n: exact[n] for n in names} | {n + "_se": abs(exact[n]) * 0.004 for n in names}
                accuracy = 0.3 + 0.4 * (exact["overlap_ratio"] - 0.72) / 0.19
                held_out |= {"who": "student", "accuracy": accuracy, "accuracy_se": 0.03, "problems": 64, "samples": 4}
                writer.write_evaluation(step, held_out)
                if samples and step in (0, steps):
                    writer.write_samples(step, made_up_samples(rng))
    return run


def made_up_samples(rng: np.random.Generator, problems: int = 6, tokens: int = 1024) -> list[dict[str, Any]]:
    """Long responses that hold markup, with what is logged of every token, as ``evaluation/heldout.py`` writes it."""
    words = [
        "so",
        " 2",
        " *",
        " 4",
        " =",
        " 8",
        ",",
        "\n",
        " then",
        " let",
        " x",
        " be",
        " the",
        " number",
        " of",
        " π",
    ]
    rows = []
    for i in range(problems):
        texts = [words[j] for j in rng.integers(0, len(words), tokens)]
        texts[3:3] = ["</pre>", "<script>", "alert(1)", "</script>", "<img src=x onerror=alert(2)>"]
        n = min(len(texts), 768)
        logp, advantage = -rng.exponential(0.5, n), rng.normal(-0.1, 1.0, n)
        lists = [[[words[j], p] for j, p in zip(row, (0.5, 0.2, 0.1, 0.05, 3e-5), strict=True)] for row in
                 rng.integers(0, len(words), (n, 5))]  # fmt: skip
        row = {
            "who": "student", "problem": f"What is {i + 2} * 4? {HOSTILE}", "answer": str(4 * (i + 2)),
            "response": "".join(texts), "correct": bool(i % 2), "tokens": texts,
            "kl_by_token": rng.exponential(0.2, n).round(4).tolist(), "logp": logp.round(4).tolist(),
            "logq": (logp + advantage).round(4).tolist(), "top_student": lists, "top_teacher": lists[::-1],
        }  # fmt: skip
        rows.append(row)
    return rows
