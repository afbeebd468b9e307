"""Benchmarks by name or file, and the comparison of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_jax.config import Data
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError
from opd_jax.evaluation.benchmarks import BENCHMARKS, load_problems, parse_benchmarks
from opd_jax.evaluation.comparison import compare
from opd_jax.tracking.console import console

SHARED = Path(__file__).parents[2] / "shared" / "data"


def write(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in rows))
    return path


def test_names_files_and_settings(tmp_path: Path) -> None:
    file = write(tmp_path / "own.jsonl", ("1", "1"))
    found = parse_benchmarks(["aime24", str(file), f"mine={file}", "task:products-5x2", "USER/set", "data.chat=false"])
    assert list(found) == ["aime24", "own", "mine", "task:products-5x2", "USER/set"]
    assert found["aime24"] == Data(source="HuggingFaceH4/aime_2024", split="train", template="boxed", chat=False)
    assert found["own"] == found["mine"] == Data(source=str(file), template="boxed", chat=False)
    assert found["task:products-5x2"].template == "plain"
    gsm8k = parse_benchmarks(["gsm8k", "template=dapo", "split=train"])["gsm8k"]
    assert gsm8k == Data(source="openai/gsm8k", subset="main", split="train", template="dapo")


def test_files_of_a_directory(tmp_path: Path) -> None:
    for name in ("aime25.jsonl", "gsm8k_test.jsonl", "math500.parquet"):
        (tmp_path / name).touch()
    found = parse_benchmarks(["aime25", "gsm8k", "math500"], tmp_path)
    assert [d.source for d in found.values()] == [
        str(tmp_path / name) for name in ("aime25.jsonl", "gsm8k_test.jsonl", "math500.parquet")
    ]
    with pytest.raises(InputError, match=r"amc23: --data .* has none of amc23\.jsonl, amc23\.parquet, amc23_test"):
        parse_benchmarks(["amc23"], tmp_path)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["aime-24"], "aime-24: no such benchmark; did you mean aime24[?] Known: aime24, "),
        (["aime24", "aime24"], "'aime24' stands twice"),
        (["template=boxed"], "no benchmark given"),
        (["aime24", "templat=boxed"], "templat: unknown key; did you mean 'template'"),
    ],
)
def test_mistakes(items: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_benchmarks(items)


def test_what_was_asked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task_tokenizer(tmp_path / "tokenizer", "products-5x2")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    warnings: list[str] = []
    monkeypatch.setattr(console, "warn", warnings.append)
    rows = [(f"{i} * 2 mod 5 ?", str(i * 2 % 5)) for i in range(4)]
    write(tmp_path / "amc23.jsonl", *rows)
    settings = ["template=plain", "chat=false"]
    (first,) = load_problems(parse_benchmarks(["amc23", *settings], tmp_path), tokenizer, 0)
    assert (first.source, len(first.records)) == (str(tmp_path / "amc23.jsonl"), 4)
    assert warnings == [f"amc23: 4 problems in {tmp_path}/amc23.jsonl; the published set has 40"]
    write(tmp_path / "copy.jsonl", *rows)
    parsed = parse_benchmarks([str(tmp_path / "copy.jsonl"), "template='1 {problem}'", "chat=false"])
    assert load_problems(parsed, tokenizer, 0)[0].sha256 == first.sha256
    for other in ([*rows[:3], ("3 * 2 mod 5 ?", "2")], [*rows[:3], ("3 * 3 mod 5 ?", "1")], rows[::-1], rows[:3]):
        write(tmp_path / "copy.jsonl", *other)
        assert load_problems(parsed, tokenizer, 0)[0].sha256 != first.sha256
    (few,) = load_problems(parse_benchmarks(["amc23", *settings], tmp_path), tokenizer, 0, first=3)
    assert (len(few.records), len(few.encoded)) == (3, 3)
    assert BENCHMARKS["gsm8k"].problems == 1319


@pytest.mark.skipif(not SHARED.is_dir(), reason="the math problem files are not here")
def test_the_published_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task_tokenizer(tmp_path / "tokenizer", "products-5x2")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(console, "warn", pytest.fail)
    benchmarks = parse_benchmarks([*BENCHMARKS, "chat=false", "max_prompt=100000"], SHARED)
    for each in load_problems(benchmarks, tokenizer, 0):
        assert len(each.records) == BENCHMARKS[each.name].problems


def result(path: Path, name: str, right: Any, samples: int = 4, sha256: str = "a" * 64, of: str = "aime24") -> Path:
    rows = [{"id": str(i), "correct": int(c)} for i, c in enumerate(right)]
    row = {"problems": len(rows), "samples": samples, "sha256": sha256, "per_problem": rows}
    path.write_text(json.dumps({"settings": {"model": f"models/{name}"}, "benchmarks": {of: row}}))
    return path


def test_comparison_is_paired(tmp_path: Path) -> None:
    """After is half a point better on every problem: a certain difference, of accuracies that are not."""
    before = np.random.default_rng(0).integers(0, 3, 40)
    first, after = result(tmp_path / "a.json", "student", before), result(tmp_path / "b.json", "student", before + 1)
    teacher = result(tmp_path / "t.json", "teacher", before + 2)
    out = tmp_path / "out"
    found = compare([first, after], teacher, out)
    assert found["results"] == ["student (1)", "student (2)", "teacher"]
    rows = found["benchmarks"]["aime24"]
    assert [row["accuracy"]["mean"] for row in rows] == pytest.approx([before.mean() / 4 + 0.25 * i for i in range(3)])
    assert rows[1]["difference"] == {"mean": 0.25, "error": 0, "low": 0.25, "high": 0.25}
    assert rows[1]["accuracy"]["high"] - rows[1]["accuracy"]["low"] > 0.08
    assert rows[1]["gap_recovery"]["mean"] == pytest.approx(0.5)
    assert (rows[0]["difference"], rows[0]["gap_recovery"], rows[2]["gap_recovery"]) == (None, None, None)
    assert json.loads((out / "comparison.json").read_text()) == found
    assert "| student (2) |" in (out / "comparison.md").read_text()
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    right = np.arange(4)
    first = result(tmp_path / "a.json", "a", right)
    others = result(tmp_path / "b.json", "b", right, sha256="b" * 64)
    with pytest.raises(InputError, match=r"aime24 was not the same problems everywhere \(a: 4, b: 4"):
        compare([first, others])
    with pytest.raises(InputError, match=r"no benchmark that all results have \(a: aime24; b: amc23\)"):
        compare([first, result(tmp_path / "b.json", "b", right, of="amc23")])
    with pytest.raises(InputError, match="one result"):
        compare([first])
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(InputError, match=r"c\.json: not a result\.json of `opd eval`"):
        compare([first, tmp_path / "c.json"])
