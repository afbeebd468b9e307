"""Duplicates: what is one and what is not, by hand; the real files against what is known of them."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from opd_jax.config import Data
from opd_jax.data.dedup import Duplicate, Placed, find_duplicates, load_embedder, normalise
from opd_jax.data.sources import Record, load_records
from opd_jax.data.templates import INSTRUCTIONS, render, strip_instruction
from opd_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def placed(*problems: str | tuple[str, str], name: str = "a") -> list[Placed]:
    pairs = [p if isinstance(p, tuple) else (p, "1") for p in problems]
    return [(f"{name}:{i}", Record(str(i), problem, answer)) for i, (problem, answer) in enumerate(pairs)]


def reasons(found: list[Duplicate]) -> dict[int, tuple[str, str]]:
    return {d.index: (d.reason, d.of[0]) for d in found}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $x$ ?", "what is  x?"),
        (r"Find $\dfrac{1}{2}$", r"find \(\frac 12\)"),
        (r"\[\left| m - n \right|\,\]", "$|m-n|$"),
        (r"$x \le 1{,}000$", r"$x\leq1000$"),
        (r"$n^{\text{th}}$ root", "n^th root"),
        ("−1 apples", "-1 apples."),
        ("$a_{1}$", "$a_1$ "),
        ("a_1", "a1"),
        ("ｘ ＋ 1", "x + 1"),
        *((render("What is $2+2$?", template), "What is $2+2$?") for template in INSTRUCTIONS),
        (r"2+2? Please reason step by step,   and put your final answer within \boxed{{}}.", "2+2?"),
    ],
)
def test_the_same_problem(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("$z^4 + z^2$", "$z^4 - z^2$"),
        (r"$\tan 22.5^\circ$", r"$\tan 225^\circ$"),
        (r"$88 \div 4 \div 2$", r"$88 \div (4 \div 2)$"),
        (r"$\arcsin 1$", r"$\arcsin(-1)$"),
        ("x < y", "x > y"),
        ("n!", "n"),
        ("我有3个苹果", "我有4个苹果"),
    ],
)
def test_another_problem(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


def test_instructions_are_stripped_only_where_they_stand() -> None:
    for template in INSTRUCTIONS:
        assert strip_instruction(render("a\n\nb", template)) == "a\n\nb"
    for text in ("a", "", "Solve the following math problem step by step. a", "\\boxed{} a"):
        assert strip_instruction(text) == text


def test_within_a_set_the_first_is_kept_and_contradictions_go() -> None:
    rows = placed("a + b", "c", "A+B", ("d", "x = 4"), "c.", ("d", "4"), ("e", "1"), ("E", "2"), ("e ", "1"))
    conflict = "conflicting answers"
    assert reasons(find_duplicates(rows)) == {
        2: ("exact", "a:0"),
        4: ("exact", "a:1"),
        5: ("exact", "a:3"),
        6: (conflict, "a:7"),
        7: (conflict, "a:6"),
        8: (conflict, "a:6"),
    }


def test_against_another_set_letters_and_digits_count() -> None:
    rows = placed("z + 1", "z - 1", "y", "$ $ ?")
    assert reasons(find_duplicates(rows, placed("Z+1", "+", name="b"))) == {
        0: ("exact", "b:0"),
        1: ("letters and digits", "b:0"),
    }


def angles(texts: list[str]) -> np.ndarray:
    """An embedding on the unit circle: each text is its own angle in degrees."""
    radians = np.deg2rad([float(text) for text in texts])
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_near_duplicates_by_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_jax.data.dedup.CHUNK", 2)
    rows = placed("0", "40", "53", "54", "107", "0.0")  # cos 53.13° = 0.6
    found = find_duplicates(rows, embed=angles)
    # 40 and 53 are near 0; 107 is near 54 alone; "0.0" is 0 as a number, not as a text
    assert reasons(found) == {1: ("near", "a:0"), 2: ("near", "a:0"), 4: ("near", "a:3"), 5: ("near", "a:0")}
    assert found[0].similarity == pytest.approx(np.cos(np.deg2rad(40)))
    assert reasons(find_duplicates(rows, embed=angles, similarity=0.99)) == {3: ("near", "a:2"), 5: ("near", "a:0")}
    against = find_duplicates(rows, placed("100", "0", name="b"), angles)
    assert reasons(against) == {
        0: ("exact", "b:1"), 1: ("near", "b:1"), 2: ("near", "b:0"), 3: ("near", "b:0"), 4: ("near", "b:0"),
        5: ("near", "b:1"),
    }  # fmt: skip


def test_embeddings_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = placed(*map(str, range(60)))
    found = {
        d.index for d in find_duplicates(rows, embed=lambda texts: vectors[[int(t) for t in texts]], similarity=0.9)
    }
    kept: list[int] = []
    for i in range(60):
        if all(vectors[i] @ vectors[j] < 0.9 for j in kept):
            kept.append(i)
    assert found == set(range(60)) - set(kept)
    assert found


def test_sentence_transformers_is_asked_for_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class SentenceTransformer:
        def __init__(self, *args: object, **settings: object) -> None:
            if args == ("absent",):
                raise OSError("no such model\nat all")
            asked.append((args, settings))

        def encode(self, texts: list[str], **settings: object) -> list[list[float]]:
            asked.append((texts, settings))
            return [[1.0, 0.0]] * len(texts)

    fake = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    assert load_embedder("m")(["a", "b"]).shape == (2, 2)
    assert asked[0] == (("m",), {"trust_remote_code": False})
    assert asked[1] == (["a", "b"], {"normalize_embeddings": True, "show_progress_bar": False})
    with pytest.raises(InputError, match=r"--near absent: cannot load it \(no such model\)\."):
        load_embedder("absent")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'opd-jax\[near\]'"):
        load_embedder("m")


def read(name: str) -> list[Placed]:
    source = str(SHARED / f"{name}.jsonl")
    return [(f"{name}:{i}", record) for i, record in enumerate(load_records(Data(source=source)), start=1)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the math problem files are not here")
def test_real_training_files_against_the_evaluation_files() -> None:
    """Known: 19 English rows (15 texts) of DAPO stand in evaluation sets, one problem of MATH-12k in MATH-500.

    That count took |m − n| and \\left| m − n \\right| for two problems, and left out signs.
    """
    began = time.monotonic()
    evaluation = [row for name in ("aime24", "aime25", "amc23", "math500") for row in read(name)]
    places = {where for where, _ in evaluation}
    hits = {}
    for name in ("dapo_math_17k", "deepmath_dedup_14k", "math12k_train"):
        rows = read(name)
        hits[name] = [(rows[d.index][1], d) for d in find_duplicates(rows, evaluation) if d.of[0] in places]
    assert time.monotonic() - began < 60  # s; 4 on one idle core
    clean = {record.id for _, record in read("dapo_math_en_dedup")}
    dapo = hits["dapo_math_17k"]
    assert [record.problem.count("|m - n|") for record, _ in dapo if record.id in clean] == [1]
    known = [(record, d) for record, d in dapo if record.id not in clean]
    assert len(known) == 19
    assert len({d.of[0] for _, d in known}) == 15
    assert {d.of[0].split(":")[0] for _, d in known} == {"amc23", "math500"}
    assert [record.id for record, _ in hits["math12k_train"]] == ["math12k-train/precalculus/474"]
    assert hits["deepmath_dedup_14k"] == []
