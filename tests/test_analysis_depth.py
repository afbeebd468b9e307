"""Continuations of cut rollouts against all those of a model of twelve tokens; a student that is its teacher."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax.analysis import depth
from opd_jax.analysis.depth import Continued, analyse_depth, compared, continue_rollouts
from opd_jax.analysis.pair import Drawn, Pair, Sampling, check_pair, draw_rollouts, load_panel
from opd_jax.config_files import parse_data
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool, find_answer
from opd_jax.models.decoder import DecoderConfig, forward, head, unembed
from opd_jax.models.hf import save_model

WORDS = ("<pad>", "<eos>", "mod", "so", *map(str, range(8)))  # the last number is the answer
TINY = DecoderConfig(
    "llama", len(WORDS), width=16, hidden=32, layers=1, heads=2, kv_heads=2, head_dim=8, norm_eps=1e-6, rope_theta=1e4,
    max_positions=32, tie_embeddings=True,
)  # fmt: skip
LIMIT, DEPTHS, CONTINUATIONS = 5, (0, 2), 400
SAMPLING = Sampling(samples=2, max_response=LIMIT, fallback_number=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twelve")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)
    for seed, name in enumerate(("student", "teacher")):
        save_model(path / name, tiny_runs.params_of(TINY, seed, 2.0), TINY, tokenizer_from=path)
    rows = [{"problem": f"{i} {i + 1} mod", "answer": str(i + 2)} for i in range(4)]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(paths: Path) -> Any:
    return parse_data(str(paths / "problems.jsonl"), ("chat=false",))


@pytest.fixture(scope="module")
def pair(paths: Path) -> Pair:
    return check_pair(paths / "student", [paths / "teacher"], batch=64, dtype="float32")


@pytest.fixture(scope="module")
def drawn(pair: Pair, paths: Path) -> Drawn:
    panel, _ = load_panel(pair, source(paths), SAMPLING)
    with AnswerPool(1, fallback_number=True) as pool:
        return draw_rollouts(pair, pair.load(pair.student), panel, pool, SAMPLING, "student")


def chance(pair: Pair, path: Path, drawn: Drawn, row: int, cut: int) -> float:
    """Probability that a continuation is right, from all 12^(LIMIT − cut) of them."""
    network, steps = pair.load(path), LIMIT - cut
    P, n = drawn.panel.prompts.tokens.shape[1], int(drawn.panel.prompts.lengths[row])
    prefix = np.asarray(drawn.rollouts.tokens[row, :cut])
    before = np.concatenate([drawn.panel.prompts.tokens[row, P - n :], prefix])
    ends = np.array(list(itertools.product(range(len(WORDS)), repeat=steps)))
    texts = np.concatenate([np.tile(before, (len(ends), 1)), ends], axis=1)
    positions = np.broadcast_to(np.arange(texts.shape[1]), texts.shape)
    hidden = forward(network.params, TINY, jnp.asarray(texts), jnp.asarray(positions), jnp.ones(texts.shape, jnp.int32))
    logits = np.asarray(unembed(hidden[:, len(before) - 1 : -1], head(network.params)), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    weight = np.exp(np.take_along_axis(logp, ends[..., None], -1)[..., 0].sum(1))  # what follows an end sums to 1
    assert weight.sum() == pytest.approx(1, abs=1e-4)
    tokenizer, gold = load_tokenizer(path), drawn.panel.answers[row // drawn.panel.samples]
    right = []
    for end in ends.tolist():
        text = tokenizer.decode(
            [*prefix.tolist(), *end[: end.index(1) if 1 in end else None]], skip_special_tokens=True
        )
        right.append(find_answer(text, fallback_number=True)[0] == gold)
    return float(weight @ np.array(right))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_accuracies_against_all_continuations(pair: Pair, paths: Path, drawn: Drawn, who: str) -> None:
    cuts = (2, 3)
    with AnswerPool(1, fallback_number=True) as pool:
        found = continue_rollouts(pair, pair.load(paths / who), drawn, cuts, CONTINUATIONS, SAMPLING, pool)
    for cut, each in zip(cuts, found, strict=True):
        assert each.rows.tolist() == np.flatnonzero(drawn.lengths > cut).tolist()
        assert each.lengths.max() == LIMIT - cut
        assert (each.stopped | (each.lengths == LIMIT - cut)).all()
        exact = np.array([chance(pair, paths / who, drawn, row, cut) for row in each.rows])
        error = np.sqrt(exact * (1 - exact) / CONTINUATIONS)
        assert 0.01 < exact.mean() < 0.99
        assert (np.abs(each.correct.mean(1) - exact) < 4 * error + 1e-3).all()


def test_a_student_that_is_its_teacher(paths: Path) -> None:
    result = analyse_depth(paths / "student", paths / "student", source(paths), SAMPLING, [2, 0, 2], 3, dtype="float32")
    assert result == json.loads(json.dumps(result, allow_nan=False))
    assert [row["depth"] for row in result["depths"]] == [0, 2]
    for row in result["depths"]:
        assert row["difference"] == {"value": 0, "error": None, "low": None, "high": None}
        assert row["student"] == row["teacher"]
        assert row["student_length"] == row["teacher_length"]
        assert row["rollouts"] + row["left_out"] == 8
    assert result["change"]["value"] == 0
    for part in result["by_depth"]["reverse_kl"]:
        assert abs(part["mean"]) < 1e-5
    assert [part["start"] for part in result["by_depth"]["overlap_ratio"]] == [0, 2]
    shown = depth.section(result)
    assert "no change of the teacher's advantage is certain" in shown.lead[-1]
    assert [len(plot.draw().axes) for plot in shown.plots] == [1] * 5


def test_rows_that_reach_a_depth_and_their_prompts() -> None:
    """Three prompts of two rollouts with 1, 5; 3, 5; 5, 2 tokens, cut at 1 and 3."""
    panel = SimpleNamespace(problems=("a", "b", "c"), samples=2, rows=6)
    drawn: Any = SimpleNamespace(panel=panel, lengths=np.array([1, 5, 3, 5, 5, 2]))

    def ends(rows: list[int], correct: list[list[int]]) -> Continued:
        right = np.array(correct, bool)
        return Continued(np.array(rows), right, np.ones(right.shape), np.ones(right.shape, bool))

    shallow, deep = [1, 2, 3, 4, 5], [1, 3, 4]
    student = [ends(shallow, [[0, 0], [0, 1], [0, 0], [1, 1], [0, 0]]), ends(deep, [[0, 1], [0, 0], [1, 1]])]
    teacher = [ends(shallow, [[1, 1], [1, 1], [0, 1], [1, 1], [1, 1]]), ends(deep, [[0, 1], [0, 1], [1, 1]])]
    found = compared(drawn, [1, 3], student, teacher)
    first, last = found["depths"]
    assert (first["rollouts"], first["left_out"], last["rollouts"], last["left_out"]) == (5, 1, 3, 3)
    assert first["student"]["value"] == pytest.approx((0 + 0.5 + 0 + 1 + 0) / 5)
    assert first["difference"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 0 + 1) / 5)
    assert first["beyond_deepest"]["difference"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert last["difference"]["value"] == last["beyond_deepest"]["difference"]["value"] == pytest.approx(0.5 / 3)
    assert found["change"]["value"] == pytest.approx((0.5 - 1.5) / 3)


@pytest.mark.parametrize(
    ("depths", "says"),
    [([1, LIMIT], "expected numbers of tokens from 0 to below --max-response, 5"), ([-1], "from 0 to below")],
)
def test_depths_that_cannot_be(paths: Path, depths: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        analyse_depth(paths / "student", paths / "teacher", source(paths), SAMPLING, depths, 1)


def test_a_depth_beyond_all_rollouts(paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short: Any = SimpleNamespace(lengths=np.array([2, 3]))
    monkeypatch.setattr(depth, "draw_rollouts", lambda *_: short)
    with pytest.raises(InputError, match=r"--depths 3, 4: no rollout of .*student goes beyond; the longest has 3"):
        analyse_depth(paths / "student", paths / "teacher", source(paths), SAMPLING, [1, 3, 4], 1)
