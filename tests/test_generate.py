"""``opd generate``: lines that a teacher-forced pass agrees with; killed, stopped or out of room, and then resumed."""

from __future__ import annotations

import errno
import io
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from test_cli import start

from opd_jax import generate as module
from opd_jax.config_files import parse_data
from opd_jax.data.pipeline import encode_examples
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError, Interrupted
from opd_jax.generate import generate_file
from opd_jax.models.decoder import forward, head, unembed
from opd_jax.models.hf import load_model
from opd_jax.sampling.law import Law

EOS, LIMIT = 1, 12
SOURCE = f"task:{tiny_runs.TASK}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


def sample(models: Path, out: Path, overrides: tuple[str, ...] = ("limit=24",), **changes: Any) -> dict[str, Any]:
    """96 responses in 16 slots, so that every slot is filled again several times."""
    settings: dict[str, Any] = {
        "samples": 4,
        "problems": None,
        "max_response": LIMIT,
        "law": Law(0.9),
        "slots": 16,
        "seed": 3,
        "dtype": "float32",
    }
    model = changes.pop("model", models / "teacher")
    return generate_file(model, parse_data(SOURCE, ("chat=false", *overrides)), out, **settings | changes)


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file made without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    sample(models, out)
    return out


def rows(out: Path) -> dict[tuple[int, int], dict[str, Any]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(row["prompt_id"], row["sample"]): row for row in lines}
    assert len(found) == len(lines)
    return found


def assert_same(a: Path, b: Path) -> None:
    a_rows, b_rows = rows(a), rows(b)
    assert a_rows.keys() == b_rows.keys()
    for key, row in a_rows.items():
        other = b_rows[key]
        np.testing.assert_allclose(row.pop("logp"), other.pop("logp"), atol=1e-4)
        assert row == other


def cut(whole: Path, out: Path, size: int) -> Path:
    """The first bytes of the file, as a kill may leave them."""
    out.write_bytes(whole.read_bytes()[:size])
    Path(f"{out}.meta.json").write_bytes(Path(f"{whole}.meta.json").read_bytes())
    return out


def test_lines_hold_what_was_sampled(models: Path, whole: Path) -> None:
    found, tokenizer = rows(whole), load_tokenizer(models / "teacher")
    records = load_records(parse_data(SOURCE, ["limit=24"]), seed=3)
    assert found.keys() == {(i, s) for i in range(24) for s in range(4)}
    for (i, s), row in found.items():
        record, tokens = records[i], row["tokens"]
        assert (row["id"], row["problem"], row["answer"]) == (f"{record.id}.{s}", record.problem, record.answer)
        assert row["prompt_tokens"] == tokenizer.encode(record.problem)
        assert row["response"] == tokenizer.decode([t for t in tokens if t > EOS])
        stopped = row["finish_reason"] == "stop"
        assert (tokens[-1] == EOS) == stopped
        assert len(tokens) == LIMIT or stopped
        assert EOS not in tokens[:-1]
    assert {row["finish_reason"] for row in found.values()} == {"stop", "length"}
    assert len({tuple(found[0, s]["tokens"]) for s in range(4)}) == 4


def test_logp_is_that_of_a_teacher_forced_pass(models: Path, whole: Path) -> None:
    params, network = load_model(models / "teacher")
    found = list(rows(whole).values())
    texts = [row["prompt_tokens"] + row["tokens"] for row in found]
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for line, text in zip(tokens, texts, strict=True):
        line[: len(text)] = text
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(params, network, jnp.asarray(tokens), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32))
    logits = unembed(hidden, head(params))[..., : tiny_runs.VOCAB]
    logp = np.asarray(jax.nn.log_softmax(logits / 0.9))
    for row, values in zip(found, logp, strict=True):
        start, n = len(row["prompt_tokens"]) - 1, len(row["tokens"])
        np.testing.assert_allclose(row["logp"], values[start + np.arange(n), row["tokens"]], atol=1e-4)


def test_it_is_training_data(models: Path, whole: Path, tmp_path: Path) -> None:
    spoken = [line for line in whole.read_text().splitlines(keepends=True) if '"response": ""' not in line]
    (tmp_path / "sft.jsonl").write_text("".join(spoken))
    data = parse_data(str(tmp_path / "sft.jsonl"), ["problem=problem", "response=response", "chat=false"])
    records = load_records(data)
    lines = [json.loads(line) for line in spoken]
    assert [(r.problem, r.answer, r.response) for r in records] == [
        (line["problem"], line["answer"], line["response"]) for line in lines
    ]
    examples, _, overlong = encode_examples(records, load_tokenizer(models / "teacher"), data, LIMIT + 1)
    assert overlong == (0, 0)
    assert [e.prompt for e in examples] == [line["prompt_tokens"] for line in lines]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99, 1.0])
def test_a_file_cut_anywhere_is_completed(models: Path, whole: Path, tmp_path: Path, share: float) -> None:
    out = cut(whole, tmp_path / "out.jsonl", int(share * whole.stat().st_size))
    result = sample(models, out, slots=8 if share < 0.5 else 40, resume=True)
    assert_same(out, whole)
    lengths = [len(row["tokens"]) for row in rows(whole).values()]
    assert result["responses"] == 96
    assert result["response_length"] == pytest.approx(np.mean(lengths))
    assert result["truncation_rate"] == pytest.approx(
        np.mean([row["finish_reason"] == "length" for row in rows(whole).values()])
    )
    assert (result["occupancy"] is None) == (share == 1)


def test_killed_before_the_first_line(models: Path, whole: Path, tmp_path: Path) -> None:
    out = cut(whole, tmp_path / "out.jsonl", 0)
    out.unlink()
    sample(models, out, resume=True)
    assert_same(out, whole)


def test_stop_keeps_what_is_finished(models: Path, whole: Path, tmp_path: Path) -> None:
    out, stop = tmp_path / "out.jsonl", threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match=r"stopped with \d+ responses finished; continue with --resume"):
        sample(models, out, stop=stop)
    assert 0 < len(rows(out)) < 96
    sample(models, out, resume=True)
    assert_same(out, whole)


def test_a_full_disk_keeps_what_is_finished(
    models: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, room = tmp_path / "out.jsonl", 3000

    class SmallDisk(io.FileIO):
        def write(self, line: Any) -> int:
            free = room - out.stat().st_size
            if free <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(line[:free])

    monkeypatch.setattr(module, "FileIO", SmallDisk)
    with pytest.raises(InputError, match=r"out\.jsonl: cannot write \(No space left .* make room and continue with"):
        sample(models, out)
    assert 0 < len(rows(out)) < 96
    assert out.read_bytes().endswith(b"}\n")
    monkeypatch.undo()
    sample(models, out, resume=True)
    assert_same(out, whole)


ONE_EACH: dict[str, Any] = {
    "samples": 1,
    "problems": None,
    "max_response": 2,
    "law": Law(),
    "slots": 8,
    "seed": 0,
    "dtype": "float32",
}

CHANGED = [
    ("seed", {"seed": 4}),
    ("temperature", {"law": Law(0.8)}),
    ("top_p", {"law": Law(0.9, 0.5)}),
    ("top_k", {"law": Law(0.9, 1.0, 5)}),
    ("samples", {"samples": 5}),
    ("max_response", {"max_response": 13}),
    ("dtype", {"dtype": "bfloat16"}),
    ("prompts", {"problems": 20}),
    ("data.limit", {"overrides": ("limit=23",)}),
    ("data.template", {"overrides": ("limit=24", "template='1 {problem}'")}),
]


@pytest.mark.parametrize(("field", "change"), CHANGED, ids=[field for field, _ in CHANGED])
def test_other_settings_are_refused_by_name(
    models: Path, whole: Path, tmp_path: Path, field: str, change: dict[str, Any]
) -> None:
    out = cut(whole, tmp_path / "out.jsonl", 1000)
    with pytest.raises(InputError, match=f"settings differ(.|\n)*  {field}: it was begun with"):
        sample(models, out, **change, resume=True)
    assert out.stat().st_size == 1000


def test_another_model_and_other_prompts_are_refused(models: Path, whole: Path, tmp_path: Path) -> None:
    out = cut(whole, tmp_path / "out.jsonl", 1000)
    with pytest.raises(InputError, match="model_fingerprint: it was begun with"):
        sample(models, out, model=models / "student", resume=True)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"problem": "1 * 2 mod 5 ?"}\n')
    data = parse_data(str(prompts), ["chat=false"])
    generate_file(models / "student", data, tmp_path / "o.jsonl", **ONE_EACH)
    prompts.write_text('{"problem": "1 * 3 mod 5 ?"}\n')
    with pytest.raises(InputError, match="prompts_sha256: it was begun with"):
        generate_file(models / "student", data, tmp_path / "o.jsonl", **ONE_EACH, resume=True)
    assert "answer" not in rows(tmp_path / "o.jsonl")[0, 0]


def test_a_foreign_line_is_named(models: Path, whole: Path, tmp_path: Path) -> None:
    out = cut(whole, tmp_path / "out.jsonl", 0)
    out.write_bytes(whole.read_bytes().split(b"\n")[0] + b'\n{"prompt_id": 3}\n')
    with pytest.raises(InputError, match=r"out\.jsonl:2: not a line of"):
        sample(models, out, resume=True)


def test_long_prompts_are_dropped_or_cut_and_counted(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"problem": "1 * 2 mod 5 ?"}\n{"problem": "1 * 2 * 3 mod 5 ?"}\n')
    counts, tokens = {}, {}
    for overlong in ("drop", "truncate"):
        data = parse_data(str(prompts), ["chat=false", "max_prompt=6", f"overlong={overlong}"])
        out = tmp_path / f"{overlong}.jsonl"
        result = generate_file(models / "student", data, out, **ONE_EACH)
        counts[overlong] = result["dropped_prompts"], result["truncated_prompts"]
        tokens[overlong] = [rows(out)[key]["prompt_tokens"] for key in sorted(rows(out))]
    assert counts == {"drop": (1, 0), "truncate": (0, 1)}
    assert tokens == {"drop": [[16, 2, 17, 4, 20, 5]], "truncate": [[16, 2, 17, 4, 20, 5], [17, 2, 18, 4, 20, 5]]}
    printed = capsys.readouterr().out
    assert "1 prompts (1 too long, dropped) × 1" in printed
    assert "2 prompts (1 prompts too long, cut at the left) × 1" in printed


def test_damaged_weights_are_noticed(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        params, network = load_model(*arguments)
        return jax.tree.map(lambda x: x * jnp.nan, params), network

    monkeypatch.setattr(module, "load_model", broken)
    with pytest.raises(InputError, match="log-probabilities are not finite"):
        sample(models, tmp_path / "out.jsonl")


@pytest.mark.long
def test_signals_end_the_program_and_resume_completes(models: Path, tmp_path: Path) -> None:
    """SIGTERM: code 3; SIGKILL: nothing; then the rest, here on 8 devices instead of one."""
    log = tmp_path / "log"
    options = ["--samples", "40", "--max-response", str(LIMIT), "--dtype", "float32", "--seed", "3"]
    options += ["--temperature", "0.9"]

    def begin(*more: str) -> tuple[Any, Path]:
        out = tmp_path / "out.jsonl"
        before = out.stat().st_size if out.exists() else 0
        arguments = [str(models / "teacher"), SOURCE, str(out), "chat=false", "limit=25"]
        process = start("generate", *arguments, *options, *more, log=log)
        while not (out.exists() and out.stat().st_size > before + 5_000):
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        return process, out

    process, out = begin()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    assert "continue with --resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    stopped = len(rows(out))

    process, out = begin("--resume")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert stopped < out.read_bytes().count(b"\n") < 1_000

    common: dict[str, Any] = {"overrides": ("limit=25",), "samples": 40}
    sample(models, out, **common, resume=True)
    sample(models, tmp_path / "whole.jsonl", **common)
    assert_same(out, tmp_path / "whole.jsonl")
