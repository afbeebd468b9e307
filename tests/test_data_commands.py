"""``opd data``: what it prints and writes, and that a mistake gives one message, code 2 and no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data_templates import CHAT, make_tokenizer
from test_data_templates import ids as ids_of

from opd_jax.cli import main
from opd_jax.config_files import parse_data
from opd_jax.data.filters import ends_in_a_loop, repeated_share
from opd_jax.data.sources import load_records
from opd_jax.tracking.console import console

GOOD: dict[str, Any] = {"problem": "1 + 1 ?", "answer": "2", "finish_reason": "stop"}
ROLLOUTS = [
    {"id": "a.0", "response": "It is 1 + 1. Answer: 2"},
    {"id": "a.1", "response": "Answer: 3"},
    {"id": "a.2", "response": "Answer: 2", "finish_reason": "length"},
    {"id": "a.3", "response": "so we wait and see, " * 20 + "Answer: 2"},
    {"id": "a.4", "response": " "},
    {"id": "a.5", "response": "no idea"},
    {"id": "a.6", "response": r"\boxed{\frac{4}{2}}"},
    {"id": "a.7", "response": "Answer: 2. " * 9},
]


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def opd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``opd data …``; returns (code, output, errors)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["opd", "data", *map(str, arguments)])
        monkeypatch.setattr(console, "terminal", type(console)().terminal)
        monkeypatch.setattr(console, "_errors", type(console)()._errors)
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tokenizer(chat=CHAT).save_pretrained(path)
    return path


def test_show_writes_the_tokens_of_the_first_prompts(tmp_path: Path, model: Path, opd: Any) -> None:
    source = lines(tmp_path / "a.jsonl", *({"problem": f"what is {'1 + ' * n}1 ?"} for n in range(5)))
    code, out, _ = opd("show", f"{source} max_prompt=8", "--model", model, "-n", 2, "--json", tmp_path / "r.json")
    assert code == 0
    assert "a.jsonl 0: 7 tokens\n<user> what is 1 ?<eos><bot>\n" in out.replace("<user>what", "<user> what")
    [result] = json.loads((tmp_path / "r.json").read_text())
    assert result["prompts"][0]["tokens"] == ids_of("<user> what is 1 ? <eos> <bot>")
    # longer by two tokens each, of which max_prompt=8 takes the first alone
    assert (result["rows"], result["dropped"], result["truncated"], len(result["prompts"])) == (5, 4, 0, 1)
    assert (result["tokens_median"], result["tokens_95"], result["tokens_longest"]) == (11, 14.6, 15)
    opd("show", f"{source} max_prompt=8 overlong=truncate", "--model", model, "-n", 2, "--json", tmp_path / "r.json")
    [result] = json.loads((tmp_path / "r.json").read_text())
    assert (result["dropped"], result["truncated"]) == (0, 4)
    assert result["prompts"][1]["tokens"] == ids_of("what is 1 + 1 ? <eos> <bot>")
    assert opd("show", f"{source} max_prompt=3", "--model", model)[0] == 0


def test_show_reads_the_mixture_of_a_configuration(tmp_path: Path, model: Path, opd: Any) -> None:
    source = lines(tmp_path / "a.jsonl", {"problem": "what ?"})
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run_dir: r\nsteps: 1\nstudent: {{path: '{model}'}}\nkind: sft\n"
        f"data: {{response: problem, mix: {{x: {{source: '{source}'}}, y: {{source: '{source}', template: boxed}}}}}}\n"
    )
    code, out, _ = opd("show", config, "--json", tmp_path / "r.json")
    assert code == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert [(r["name"], r["rows"]) for r in results] == [("x", 1), ("y", 1)]
    assert len(results[1]["prompts"][0]["tokens"]) > len(results[0]["prompts"][0]["tokens"])
    assert out.index(" x ") < out.index(" y ")


def test_show_tells_of_the_escape_and_of_two_instructions(tmp_path: Path, model: Path, opd: Any) -> None:
    text = r"1 ? Please reason step by step, and put your final answer within \boxed{{}}."
    source = lines(tmp_path / "a.jsonl", {"problem": text}, {"problem": "1 ?"})
    code, _, err = opd("show", f"{source} template=boxed", "--model", model)
    assert code == 0
    assert r"1 problems hold \boxed{{}}, an escape" in err
    assert "1 problems hold an instruction already" in err
    assert "instruction" not in opd("show", source, "--model", model)[2]
    code, _, err = opd("show", rf"""{source} "template='{{problem}} \boxed{{{{}}}}'" """, "--model", model)
    assert code == 2
    assert "an escape that nothing renders" in err


def test_dedup_writes_the_rest_and_says_why(tmp_path: Path, opd: Any) -> None:
    a = lines(
        tmp_path / "a.jsonl", {"problem": "x + 1", "more": [1, {"é": None}]}, {"problem": "X+1"}, {"problem": "y"}
    )
    b = lines(tmp_path / "b.jsonl", {"question": "y."})
    files = {name: tmp_path / name for name in ("out.jsonl", "report.jsonl", "r.json")}
    options = ["--out", files["out.jsonl"], "--report", files["report.jsonl"], "--json", files["r.json"]]
    code, out, _ = opd("dedup", a, "--against", b, *options)
    assert code == 0
    assert "3 rows, 1 kept" in " ".join(out.split())
    assert read(files["out.jsonl"]) == [{"problem": "x + 1", "more": [1, {"é": None}]}]
    result = json.loads(files["r.json"].read_text())
    assert result["dropped"] == [
        {"stands_in": a, "reason": "exact", "rows": 1},
        {"stands_in": b, "reason": "exact", "rows": 1},
    ]
    first, second = read(files["report.jsonl"])
    assert (first["where"], first["reason"], first["of_where"]) == (f"{a}:2", "exact", f"{a}:1")
    assert (second["problem"], second["of_problem"], second["of_where"]) == ("y", "y.", f"{b}:1")


def test_near_duplicates_need_their_package(tmp_path: Path, opd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    a = lines(tmp_path / "a.jsonl", {"problem": "x"})
    code, _, err = opd("dedup", a, "--near", "m", "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert "pip install 'opd-jax[near]'" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_filter_keeps_what_is_worth_imitating(tmp_path: Path, opd: Any) -> None:
    source = lines(tmp_path / "rollouts.jsonl", *(GOOD | row for row in ROLLOUTS))
    out = tmp_path / "kept.jsonl"
    code, shown, _ = opd("filter", source, "--out", out, "--json", tmp_path / "r.json")
    assert code == 0
    assert [row["id"] for row in read(out)] == ["a.0", "a.6"]
    result = json.loads((tmp_path / "r.json").read_text())
    counts = {"responses": 8, "kept": 2, "empty": 1, "truncated": 1, "repetitive": 2, "wrong": 2}
    assert {name: result[name] for name in counts} == counts
    assert "repetitive" in shown
    assert [r.response for r in load_records(parse_data(str(out), ["response=response"]))] == [
        ROLLOUTS[0]["response"],
        ROLLOUTS[6]["response"],
    ]
    opd("filter", source, "--out", out, "--keep-wrong")
    assert [row["id"] for row in read(out)] == ["a.0", "a.1", "a.5", "a.6"]
    opd("filter", source, "--out", out, "--keep-wrong", "--max-repeated", "1")
    assert [row["id"] for row in read(out)] == ["a.0", "a.1", "a.3", "a.5", "a.6"]


def test_loops() -> None:
    walk = "one two three four five six seven eight nine ten"
    assert ends_in_a_loop("Well. " + f"{walk}, " * 3)
    assert ends_in_a_loop("Well. " + f"{walk}, " * 3 + "one two three")  # the last round is cut short
    assert not ends_in_a_loop("Well, let us see how far we come by this. " + f"{walk}, " * 2 + "one two")
    assert not ends_in_a_loop(f"{walk}, " * 30 + "that is all")
    assert not ends_in_a_loop("the matrix 0 0 0 0 0 0 0 0")
    assert ends_in_a_loop("0 " * 100)
    assert not ends_in_a_loop("")


def test_repeated_share() -> None:
    words = [str(n) for n in range(100)]
    assert repeated_share(" ".join(words)) == 0
    assert repeated_share(" ".join(words + words)) == 0.5
    assert repeated_share(" ".join(words + words[:19])) == 0  # shorter than the n-gram
    assert repeated_share(" ".join(words + words[:20])) == pytest.approx(20 / 120)
    assert repeated_share("") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "{dir}/good.jsonl"], "Give --model DIR"),
        (["show", "{dir}/none.jsonl", "--model", "{model}"], "none.jsonl: no such file"),
        (["show", "{dir}/good.jsonl templat=boxed", "--model", "{model}"], "did you mean 'template'"),
        (["show", "{dir}/good.jsonl 'open", "--model", "{model}"], "cannot be read as a source with settings"),
        (["show", "", "--model", "{model}"], "cannot be read as a source with settings"),
        (["show", "{dir}/good.jsonl", "--model", "{dir}"], "no tokenizer there"),
        (["dedup", "{dir}/bad.jsonl", "--out", "{dir}/out.jsonl"], "bad.jsonl:2: malformed JSON"),
        (["dedup", "{dir}/good.jsonl", "--against", "{dir}/bad.jsonl", "--out", "{dir}/out.jsonl"], "bad.jsonl:2: "),
        (
            ["dedup", "{dir}/good.jsonl", "--out", "{dir}/none/out.jsonl"],
            "--out {dir}/none/out.jsonl: cannot be written",
        ),
        (["filter", "{dir}/bad.jsonl", "--out", "{dir}/out.jsonl"], "bad.jsonl:2: malformed JSON"),
        (
            ["filter", "{dir}/good.jsonl", "--out", "{dir}/out.jsonl"],
            "good.jsonl:1: no column finish_reason and response",
        ),
        (["filter", "{dir}/plain.jsonl", "--out", "{dir}/out.jsonl"], "plain.jsonl:1: no answer"),
    ],
)
def test_mistakes(tmp_path: Path, model: Path, opd: Any, arguments: list[str], said: str) -> None:
    lines(tmp_path / "good.jsonl", {"problem": "a", "answer": "1"})
    lines(tmp_path / "plain.jsonl", {"problem": "a", "response": "b", "finish_reason": "stop"})
    (tmp_path / "bad.jsonl").write_text(
        '{"problem": "a", "answer": "1", "response": "b", "finish_reason": "stop"}\n{\n'
    )
    before = sorted(tmp_path.iterdir())
    code, _, err = opd(*(a.format(dir=tmp_path, model=model) for a in arguments))
    assert code == 2
    assert said.format(dir=tmp_path) in err
    assert sorted(tmp_path.iterdir()) == before


def test_bad_rows_are_counted_if_asked(tmp_path: Path, model: Path, opd: Any) -> None:
    good = json.dumps(GOOD | {"response": "Answer: 2"})
    source = tmp_path / "bad.jsonl"
    source.write_text(f'{good}\n{{"problem": \n{{"problem": ""}}\n')
    out = tmp_path / "out.jsonl"
    for command in (
        ["show", source, "--model", model], ["dedup", source, "--out", out], ["filter", source, "--out", out]
    ):  # fmt: skip
        code, shown, err = opd(*command, "--skip-bad", "--json", tmp_path / "r.json")
        assert code == 0
        assert "1 malformed JSON" in err or command[0] == "show"
        result = json.loads((tmp_path / "r.json").read_text())
        [result] = result if command[0] == "show" else [result]
        assert result["bad_rows"] == {"malformed JSON": 1, "empty problem": 1}
        assert command[0] != "show" or "bad rows" in shown
