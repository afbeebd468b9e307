"""Grading of answers: how many a second, and what hostile ones cost.

    python benchmarks/grading.py [--data DIR] [--json benchmarks/results/grading.json]

Mixed: 10,000 responses to the problems of five benchmarks as their files hold them (nine in ten have an integer
answer), half of them right, in several spellings, half with the answer to another problem. Hostile: one of each kind,
on one worker, between honest ones. Seconds of a busy machine say little: CPU seconds of this process and of the workers
stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd_jax.evaluation.answers import AnswerPool
from opd_jax.tracking.console import console

FILES = ("aime24", "aime25", "amc23", "math500", "gsm8k_test")
SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda a: rf"Thus it is \boxed{{{a}}}.",
    lambda a: rf"\boxed{{1}}? No: $\boxed{{ {a} }}$",
    lambda a: f"**Answer:** ${a}$",
    lambda a: f"so\nAnswer: {a}.",
)
HOSTILE = {
    "10^{10^{10}}": r"\boxed{10^{10^{10}}}",
    "tower of 9s": r"\boxed{9^{9^{9^{9}}}}",
    "factorials": r"\boxed{100000!!!}",
    "1 MB of open braces": r"\boxed{" + "{" * 1_000_000,
    "1 MB of braces": r"\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
    r"\frac 10,000 deep": r"\boxed{" + r"\frac{" * 10_000 + "1" + "}{2}" * 10_000 + "}",
    r"\frac 80 deep": r"\boxed{" + r"\frac{" * 80 + "1" + "}{2}" * 80 + "}",
    r"\sqrt 120 deep": r"\boxed{" + r"\sqrt{" * 120 + "x" + "}" * 120 + "}",
    "400 parentheses": r"\boxed{" + "(" * 400 + ")" * 400 + "}",
    "long product": r"\boxed{" + "(x+1)" * 190 + "}",
    "huge power": r"\boxed{(x+y+z)^{99999}}",
    "NUL bytes": "\\boxed{\0\0}",
    "1 MB of Answer:": "Answer:" * 150_000,
}
LIMIT = 1.0  # CPU seconds


def cpu_seconds(pool: AnswerPool) -> tuple[float, float]:
    """Of this process, and of its workers with all that they have forked (Linux)."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            stats[int(file.parent.name)] = (
                int(fields[1]),
                sum(map(int, fields[11:15])),
            )  # parent; with children waited for
    processes = {worker._process.pid for worker in pool._workers if worker._process}
    workers = sum(ticks for pid, (parent, ticks) in stats.items() if pid in processes or parent in processes)
    return own.ru_utime + own.ru_stime, workers / os.sysconf("SC_CLK_TCK")


def mixed_pairs(data: Path, n: int) -> tuple[list[tuple[str, str]], float]:
    """(response, gold answer) pairs, and the share of integers among the golds."""
    rng = random.Random(0)
    golds = [json.loads(line)["answer"] for name in FILES for line in (data / f"{name}.jsonl").open(encoding="utf-8")]
    pairs = []
    for i in range(n):
        gold = golds[i % len(golds)]
        answer = gold if rng.random() < 0.5 else rng.choice(golds)
        pairs.append((rng.choice(SPELLINGS)(answer), gold))
    return pairs, sum(gold.lstrip("-").isdigit() for _, gold in pairs) / n


def grade_mixed(data: Path, n: int, workers: int) -> dict[str, Any]:
    pairs, integers = mixed_pairs(data, n)
    with AnswerPool(workers) as pool:
        pool.judge([(rf"\boxed{{x+{i}}}", f"{i} + x") for i in range(50)])  # starts the workers, which takes seconds
        before, start = cpu_seconds(pool), time.perf_counter()
        verdicts = pool.judge(pairs)
        seconds, after = time.perf_counter() - start, cpu_seconds(pool)
    own, of_workers = after[0] - before[0], after[1] - before[1]
    return {
        "answers": n,
        "workers": workers,
        "integers": integers,
        "right": sum(v.correct for v in verdicts) / n,
        "lost": n - sum(v.answer is not None for v in verdicts),
        "seconds": seconds,
        "answers_per_second": n / seconds,
        "cpu_seconds": own,
        "cpu_seconds_of_workers": of_workers,
        "answers_per_second_of_two_cores": 2 * n / (own + of_workers),  # if they had nothing else to do
    }


def grade_hostile() -> list[dict[str, Any]]:
    honest = (r"\boxed{\frac12}", "0.5")
    rows = []
    with AnswerPool(1, LIMIT) as pool:
        assert pool.grade([honest]) == [True]
        for name, text in HOSTILE.items():
            before, start = cpu_seconds(pool), time.perf_counter()
            (verdict,) = pool.judge([(text, r"\frac{x}{7}")])
            seconds, after = time.perf_counter() - start, cpu_seconds(pool)
            row: dict[str, Any] = {"answer": name, "bytes": len(text), "seconds": seconds}
            row |= {"cpu_seconds": after[0] - before[0], "cpu_seconds_of_worker": after[1] - before[1]}
            rows.append(row | {"right": verdict.correct, "next_graded": pool.grade([honest]) == [True]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="directory of the five files")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mixed, hostile = grade_mixed(options.data, 10_000, 2), grade_hostile()
    console.table("10,000 mixed answers", ["what", "value"], [[k, v] for k, v in mixed.items()])
    heads = ["answer", "bytes", "seconds", "CPU s", "CPU s of worker", "right", "next graded"]
    console.table("hostile answers, one worker", heads, [list(row.values()) for row in hostile])
    if options.json:
        result = {
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "limit": LIMIT,
            "mixed": mixed,
            "hostile": hostile,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
