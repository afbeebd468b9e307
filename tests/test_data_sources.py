"""Records from every kind of source, and the complaint for every kind of bad one."""

import json
import logging
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from opd_jax.config import Data
from opd_jax.data.sources import Record, load_records
from opd_jax.errors import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
COUNTS = {
    "aime24": 30,
    "aime25": 30,
    "amc23": 40,
    "math500": 500,
    "math12k_train": 11_997,
    "gsm8k_train": 7_473,
    "gsm8k_test": 1_319,
    "dapo_math_17k": 17_917,
    "dapo_math_en_dedup": 14_012,
    "deepmath_dedup_14k": 14_116,
}


ONLINE = types.SimpleNamespace(HF_DATASETS_OFFLINE=False)


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """The command line takes the library's warnings for itself; here caplog is to have them."""
    monkeypatch.setattr(logging.getLogger("opd_jax"), "propagate", True)


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def test_jsonl_columns_ids_and_limit(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        {"id": "x", "question": "2 + 2 ?\u2028", "answer": "two and two\n#### 4 eggs #### 4", "why": "because"},
        "",
        {"id": 7, "question": "3 + 3 ?", "answer": 6, "why": "so"},
        "not reached",
    )
    records = load_records(Data(source=source, response="why", limit=2))
    assert records == [Record("x", "2 + 2 ?\u2028", "4", "because"), Record("7", "3 + 3 ?", "6", "so")]


def test_column_preference_and_choice(tmp_path):
    row = {"prompt": "c", "question": "b", "problem": "a", "target": "z", "solution": "y"}
    source = write(tmp_path / "a.jsonl", row)
    assert load_records(Data(source=source)) == [Record("0", "a", "y")]
    assert load_records(Data(source=source, problem="prompt", answer="target")) == [Record("0", "c", "z")]
    assert load_records(Data(source=write(tmp_path / "b.jsonl", {"prompt": "c"}))) == [Record("0", "c")]


def test_verl_layout_and_chat_messages(tmp_path):
    verl = {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 ?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    assert load_records(Data(source=write(tmp_path / "verl.jsonl", verl))) == [Record("0", "1 + 1 ?", "2")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([verl, verl]), tmp_path / "verl.parquet")
    assert load_records(Data(source=str(tmp_path / "verl.parquet")))[1] == Record("1", "1 + 1 ?", "2")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    data = Data(source=write(tmp_path / "chat.jsonl", chat), problem="messages", response="messages")
    assert load_records(data) == [Record("0", "hi", None, "hello")]


def test_self_made_task():
    data = Data(source="task:products-13x3", split="test", limit=5)
    records = load_records(data, seed=3, require_answer=True)
    assert len(records) == 5
    for record in records:
        numbers = [int(n) for n in record.problem.split(" mod ")[0].split(" * ")]
        assert int(record.answer or "") == numbers[0] * numbers[1] * numbers[2] % 13
        assert record.response
    assert records == load_records(data, seed=3)
    assert records != load_records(data, seed=4)


def test_hugging_face_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"question": "1 + 1 ?", "answer": "easy #### 2"}] * 3

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=ONLINE))
    records = load_records(Data(source="openai/gsm8k", subset="main", split="test", limit=2), require_answer=True)
    assert records == [Record("0", "1 + 1 ?", "2"), Record("1", "1 + 1 ?", "2")]
    assert calls == [(("openai/gsm8k", "main"), {"split": "test", "streaming": True})]
    assert len(load_records(Data(source="openai/gsm8k"))) == 3
    assert calls[1] == (("openai/gsm8k", None), {"split": "train", "streaming": False})


def test_real_dataset_streamed_or_whole(tmp_path, monkeypatch):
    write(tmp_path / "set" / "train.jsonl", *({"id": n, "problem": f"{n} ?", "answer": str(n)} for n in range(5)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = Data(source=str(tmp_path / "set"))
    assert load_records(data) == [Record(str(n), f"{n} ?", str(n)) for n in range(5)]
    assert load_records(data.model_copy(update={"limit": 2})) == load_records(data)[:2]


def test_a_stream_that_breaks_off_says_where(monkeypatch):
    def rows():
        yield {"problem": "a"}
        raise ConnectionError("lost")

    broken = types.SimpleNamespace(load_dataset=lambda *a, **k: rows(), config=ONLINE)
    monkeypatch.setitem(sys.modules, "datasets", broken)
    with pytest.raises(InputError, match=r"some/set, split train.*after row 1 \(lost\)"):
        load_records(Data(source="some/set"))


def test_unreachable_dataset_names_the_way_out(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=ONLINE))
    with pytest.raises(InputError, match=r"openai/gsm8k.*no route.*data\.source=PATH"):
        load_records(Data(source="openai/gsm8k"))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "no rows"),
        (b'{"problem": "a"}\n{"problem": \n', {}, r"bad\.jsonl:2: malformed JSON"),
        (b'{"problem": "a"}\n[1]\n', {}, r"bad\.jsonl:2: found a JSON list"),
        (b'{"problem": "a"}\n{"problem": "\xff"}\n', {}, r"bad\.jsonl:2: not UTF-8 \(byte 14"),
        (b'{"text": "a", "n": 1}\n', {}, r":1: no column problem or question or prompt\. Columns there: text, n"),
        (b'{"problem": "a"}\n', {"problem": "task"}, r"no column task.*Columns there: problem.*data\.problem=COLUMN"),
        (b'{"problem": "a"}\n', {"answer": "gold"}, r":1: no column gold"),
        (b'{"problem": "a"}\n', {"response": "why"}, r":1: no column why"),
        (b'{"problem": "a"}\n{"problem": " "}\n', {}, r":2: the problem is empty"),
        (b'{"problem": "a", "why": ""}\n', {"response": "why"}, r":1: the response .*why.* is empty"),
        (b'{"problem": {"a": 1}}\n', {}, r":1: found dict where text"),
        (b'{"prompt": ["a"]}\n', {}, r":1: found a list that is no conversation"),
        (b'{"prompt": []}\n', {}, r":1: a conversation with 0 messages"),
        (
            b'{"id": 1, "problem": "a"}\n{"id": "1", "problem": "b"}\n',
            {},
            r"bad\.jsonl:2: id '1' stands at .*bad\.jsonl:1,",
        ),
        (b'{"problem": ' + b"1" * 5_000 + b"}\n", {}, r":1: malformed JSON"),
        (b'{"problem": ' + b"[" * 100_000 + b"\n", {}, r":1: malformed JSON"),
    ],
)
def test_bad_rows(tmp_path, content, options, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_records(Data(source=str(path), **options))


def test_answers_are_required_only_where_asked_for(tmp_path):
    source = write(tmp_path / "a.jsonl", {"problem": "a", "answer": "1"}, {"problem": "b", "answer": None})
    assert [r.answer for r in load_records(Data(source=source))] == ["1", None]
    with pytest.raises(InputError, match=r"a\.jsonl:2: no answer.*data\.answer"):
        load_records(Data(source=source), require_answer=True)


GOOD = b'{"id": "g", "problem": "a", "answer": "1"}\n'
BAD = {
    b'{"problem": \n': "malformed JSON",
    b"[1]\n": "malformed JSON",
    b'{"problem": "\xff", "answer": "1"}\n': "not UTF-8",
    b'{"text": "a", "answer": "1"}\n': "missing column",
    b'{"problem": "", "answer": "1"}\n': "empty problem",
    b'{"problem": {"a": 1}, "answer": "1"}\n': "not text",
    b'{"problem": [], "answer": "1"}\n': "no conversation",
    b'{"problem": "b", "answer": null}\n': "no answer",
    b'{"id": "g", "problem": "b", "answer": "1"}\n': "repeated id",
}


def test_bad_rows_are_skipped_and_counted_if_asked(tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join([GOOD, *BAD, b'{"id": "h", "problem": "c", "answer": "2"}\n']))
    records = load_records(Data(source=str(path), skip_bad=True), require_answer=True)
    assert [r.id for r in records] == ["g", "h"]
    assert caplog.messages[0].startswith(f"{path}: 9 bad rows left out: 2 malformed JSON, ")
    for kind in BAD.values():
        assert f"{2 if kind == 'malformed JSON' else 1} {kind}" in caplog.messages[0]
    assert [r.id for r in load_records(Data(source=str(path), skip_bad=True, limit=1))] == ["g"]
    path.write_bytes(b"".join(list(BAD)[:-1]))  # nothing repeats the last one's id
    with pytest.raises(InputError, match=r"no rows left \(8 bad rows left out: 2 malformed JSON"):
        load_records(Data(source=str(path), skip_bad=True, limit=5), require_answer=True)


@pytest.mark.parametrize("row", BAD)
def test_each_bad_row_is_named_by_its_line(tmp_path, row):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + row)
    with pytest.raises(InputError, match=r"bad\.jsonl:2: "):
        load_records(Data(source=str(path)), require_answer=True)


def test_mixture_keeps_ids_apart_and_knows_the_sources(tmp_path):
    first = write(tmp_path / "a.jsonl", *({"problem": f"a{n}", "answer": "1"} for n in range(3)))
    second = write(tmp_path / "b.jsonl", *({"task": f"b{n}", "gold": "2"} for n in range(3)))
    mix = {"a": {"source": first}, "b": {"source": second, "problem": "task", "answer": "gold", "limit": 2}}
    records = load_records(Data.model_validate({"mix": mix}), require_answer=True)
    assert records == [Record(f"a/{n}", f"a{n}", "1", source="a") for n in range(3)] + [
        Record(f"b/{n}", f"b{n}", "2", source="b") for n in range(2)
    ]
    with pytest.raises(InputError, match=r"b\.jsonl:1: no column problem or question or prompt"):
        load_records(Data.model_validate({"mix": {"a": {"source": first}, "b": {"source": second}}}))


def test_an_escape_in_the_text_is_told(tmp_path, caplog):
    source = write(tmp_path / "a.jsonl", {"problem": r"1 + 1 ? Put it within \boxed{{}}."}, {"problem": r"\boxed{}"})
    load_records(Data(source=source))
    assert r"1 problems hold \boxed{{}}, an escape that nothing renders" in caplog.text


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_records(Data(source=str(tmp_path / "none.jsonl")))
    with pytest.raises(InputError, match=r"cannot read '\.csv'"):
        load_records(Data(source="problems.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="not a readable Parquet"):
        load_records(Data(source=str(tmp_path / "bad.parquet")))
    with pytest.raises(InputError, match="unknown task"):
        load_records(Data(source="task:nonsense"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the math problem files are not here")
@pytest.mark.parametrize(("name", "rows"), COUNTS.items())
def test_real_files_load_whole(name, rows):
    records = load_records(Data(source=str(SHARED / f"{name}.jsonl")), require_answer=True)
    assert len(records) == rows
    assert len({r.id for r in records}) == rows
