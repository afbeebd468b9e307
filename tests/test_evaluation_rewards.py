"""Terms of a reward, and whatever a function of one's own may do: a right value, a clear refusal, or a row left out."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from opd_jax.cli import main
from opd_jax.config import Config, Reward
from opd_jax.config_files import parse_config
from opd_jax.errors import InputError
from opd_jax.evaluation import rewards
from opd_jax.evaluation.rewards import Judge, Judged, length_penalty

USER = '''
import os, subprocess, sys, time
import numpy as np

number = 3

def words(problem, answer, response, tokens, stopped):
    return len(response.split()) + 100 * tokens + 1000 * stopped + (answer == "7") / 2

def loud(response, **_):
    print("a reply?")
    sys.stdout.write('{"value": 9}\\n')
    os.write(1, b'{"value": 9}\\n')
    return 0.25

def scalar(response, **_):
    return {"bool": True, "numpy": np.float32(0.5), "numpy bool": np.bool_(True), "axes": np.array(2)}[response]

def odd(response, **_):
    """What the response says."""
    if response == "raise": raise ValueError("no\\nbox")
    if response == "exit": sys.exit(3)
    if response == "die": os._exit(1)
    if response == "read": return input()
    if response == "hang": time.sleep(600)
    if response == "children":  # that hold its pipes
        if os.fork() == 0: time.sleep(600)
        time.sleep(600)
    return {"nan": float("nan"), "inf": -float("inf"), "none": None, "list": [1.0], "vector": np.ones(3), "text": "1",
            "huge": 10**400, "complex": 1j}.get(response, 1.0)
'''  # fmt: skip
ODD = {
    "raise": "it raised ValueError: no box",
    "exit": "it raised SystemExit: 3",
    "die": "its process ended",
    "read": "it raised EOFError",
    "hang": "it did not return within reward.limit=0.5 s",
    "children": "it did not return within reward.limit=0.5 s",
    "nan": "it returned nan, expected a finite number",
    "inf": "it returned -inf, expected a finite number",
    "none": "it returned NoneType 'None', expected one number",
    "list": "it returned list '[1.0]', expected one number",
    "vector": "it returned ndarray '[1. 1. 1.]', expected one number",
    "text": "it returned str '1', expected one number",
    "huge": "it raised OverflowError",
    "complex": "it returned complex '1j', expected one number",
}


def row(response: str, answer: str | None = "7", tokens: int = 5, stopped: bool = True, name: str = "p") -> Judged:
    return Judged(name, "3 + 4 ?", answer, response, tokens, stopped)


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Judge]]:
    """``judge(term, …) → Judge`` beside the module ``user``."""
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    made = []

    def make(*terms: str, max_response: int = 100, **settings: Any) -> Judge:
        made.append(Judge(Reward(terms=dict.fromkeys(terms, 1.0), **settings), max_response))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_answer_and_format(judge: Any) -> None:
    responses = {
        r"so \boxed{7}": (1, 1),
        r"so \boxed{8}": (0, 1),
        r"so \boxed{7.0}": (1, 1),
        r"\boxed{\frac{14}{2}}": (1, 1),  # algebra
        "Answer: 7": (1, 1),
        "it is 7": (0, 0),
        "": (0, 0),
        r"\boxed{}": (0, 0),
        r"\boxed{7": (0, 0),
    }
    got = judge("answer", "format")([row(r) for r in responses])
    np.testing.assert_array_equal(np.stack([got["answer"], got["format"]], 1), list(responses.values()))
    last = judge("answer", "format", fallback_number=True)([row("it is 7")])
    assert (last["answer"], last["format"]) == (1, 0)


def test_format_asks_no_algebra(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards.AnswerPool, "judge", None)
    assert judge("format")([row(r"\boxed{x^{2}}")])["format"] == 1


def test_length_penalty(judge: Any) -> None:
    """DAPO's Eq. 13: 0 up to limit − buffer, (limit − buffer − n) / buffer up to the limit, then −1."""
    tokens = [1, 59, 60, 61, 80, 99, 100, 120]
    want = [0 if n <= 60 else max((60 - n) / 40, -1) for n in tokens]
    np.testing.assert_allclose(length_penalty(tokens, 100, 40), want, rtol=1e-12)
    np.testing.assert_allclose(length_penalty([1, 5, 10], 10, 1024), [-0.1, -0.5, -1.0])  # no longer than the limit
    np.testing.assert_allclose(judge("length", buffer=40)([row("", tokens=n) for n in tokens])["length"], want)


def test_a_function_of_ones_own(judge: Any) -> None:
    rows = [row("a b"), row("", None, 2, False), row('\n{} "x" é\\', "7", 1)]
    both = judge("user:words", "user:loud")
    got = both(rows)
    np.testing.assert_array_equal(got["user:words"], [1502.5, 200, 1103.5])
    np.testing.assert_array_equal(got["user:loud"], [0.25] * 3)
    np.testing.assert_array_equal(both.total(got), got["user:words"] + 0.25)
    scalars = judge("user:scalar")([row(r) for r in ("bool", "numpy", "numpy bool", "axes")])
    np.testing.assert_array_equal(scalars["user:scalar"], [1, 0.5, 1, 2])
    long = row("word " * 200_000)  # more than a pipe holds
    assert judge("user:words")([long])["user:words"] == 200_000 + 1500.5


def test_weights_of_terms() -> None:
    judge = Judge(Reward(terms={"format": 2.0, "length": 0.5}, buffer=10), 10)
    rows = [row(r"\boxed{1}", tokens=10), row("", tokens=5)]
    np.testing.assert_allclose(judge.total(judge(rows)), [1.5, -0.25])
    judge.close()


def test_what_is_no_number_ends_the_run(judge: Any) -> None:
    """… with the prompt's id and what to do; afterwards the function is asked again as if nothing had been."""
    asked = judge("user:odd", limit=0.5)
    for said, fault in ODD.items():
        start = time.monotonic()
        with pytest.raises(InputError) as caught:
            asked([row("fine"), row(said, name=f"prompt-{said}")])
        message = str(caught.value)
        assert f"reward.terms.user:odd: prompt 'prompt-{said}': {fault}" in message, said
        assert "Mend the function, or set reward.skip_bad=true" in message
        assert "\n" not in message
        assert time.monotonic() - start < 30, said
        np.testing.assert_array_equal(asked([row("fine")])["user:odd"], [1.0])


def test_what_is_no_number_is_left_out_by_choice(judge: Any, caplog: pytest.LogCaptureFixture) -> None:
    asked = judge("user:odd", "length", limit=0.5, skip_bad=True)
    rows = [row(said, name=said) for said in ("fine", *ODD, "fine")]
    with caplog.at_level(logging.WARNING):
        terms = asked(rows)
    np.testing.assert_array_equal(terms["user:odd"], [1.0, *[math.nan] * len(ODD), 1.0])
    np.testing.assert_array_equal(np.isnan(asked.total(terms)), np.isnan(terms["user:odd"]))
    assert f"prompt 'raise': {ODD['raise']}. {len(ODD)} of {len(rows)} responses are left out" in caplog.text


@pytest.mark.parametrize(
    ("term", "source", "said"),
    [
        ("absent:f", "", "cannot be imported (ModuleNotFoundError: No module named 'absent')"),
        ("mine:f", "import nothing_there", "cannot be imported (ModuleNotFoundError"),
        ("mine:f", "def f(:", "cannot be imported (SyntaxError"),
        ("mine:f", "raise SystemExit(2)", "cannot be imported (SystemExit: 2)"),
        ("mine:f", "import os; os._exit(0)", "its process ended"),
        ("mine:f", "import time; time.sleep(600)", "importing it took more than 1 s"),
        ("mine:g", "def f(**_): return 1", "cannot be imported (AttributeError"),
        ("mine:f", "f = 3", "is a int, not a function"),
        (":f", "", "cannot be imported (ValueError"),
        ("mine:", "", "cannot be imported (AttributeError"),
    ],
)
def test_what_is_no_function_is_refused(
    judge: Any, monkeypatch: pytest.MonkeyPatch, term: str, source: str, said: str
) -> None:
    monkeypatch.setattr(rewards, "START_LIMIT", 1.0 if "sleep" in source else 60.0)
    Path("mine.py").write_text(source)
    with pytest.raises(InputError) as caught:
        judge(term)
    assert f"reward.terms.{term}: {said}" in str(caught.value)
    assert "is given as MODULE:FUNCTION, importable from here" in str(caught.value)


def test_an_unknown_term_is_refused(judge: Any) -> None:
    with pytest.raises(InputError, match=r"reward.terms: unknown term 'anwser'. Expected answer, format, length"):
        judge("anwser")


def test_nothing_stays_behind(judge: Any) -> None:
    """Neither after a time limit nor at the end is a process left, of the function's own children either."""
    Path("user.py").write_text(
        "import os, time\n"
        "def f(response, **_):\n"
        "    if os.fork() == 0: time.sleep(600)\n"
        "    open('group', 'a').write(f'{os.getpgid(0)}\\n')\n"
        "    time.sleep(600 if response == 'hang' else 0)\n"
        "    return 1.0\n"
    )
    asked = judge("user:f", limit=2.0)
    with pytest.raises(InputError, match="did not return"):
        asked([row("hang")])
    asked([row("fine")])
    asked.close()
    groups = [int(line) for line in Path("group").read_text().split()]
    assert len(set(groups)) == 2
    for group in groups:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"process group {group} lives on")


# --- through the command ---

TREE: dict[str, Any] = {
    "run_dir": "run",
    "steps": 2,
    "student": {"path": "student"},
    "teacher": {"path": "student"},
    "data": {"source": "rows.jsonl", "chat": False, "max_prompt": 8},
    "rollout": {"prompts": 4, "samples": 2, "max_response": 10},
    "dtype": "float32",
}
MIX = {
    "data": {"mix": {"one": {"source": "rows.jsonl"}, "two": {"source": "rows.jsonl"}}, "chat": False, "max_prompt": 8}
}
GRPO = {"kind": "grpo", "teacher": None, "reward": {"terms": {"format": 1.0}}}
NO_TEXT = {"source": "rows.jsonl", "response": "text"}
EIGHT = {"prompts": 8, "samples": 2, "max_response": 10}
REFUSED = [
    (GRPO | {"rollout": {"prompts": 8, "samples": 1}}, "set rollout.samples to 2 or more"),
    (GRPO | {"reward": None}, "kind=grpo needs a reward"),
    (GRPO | {"reward": {"terms": {}}}, "reward.terms: Dictionary should have at least 1 item"),
    (GRPO | {"reward": {"terms": {"answr": 1.0}}}, "unknown term 'answr'"),
    (GRPO | {"reward": {"terms": {"absent:f": 1.0}}}, "No module named 'absent'"),
    (GRPO | {"reward": {"terms": {"answer": 1.0}}}, "rows.jsonl:2: no answer (id '1')"),
    (GRPO | {"reward": {"terms": {"user:odd": 1.0}}, "student": {"path": "gone"}}, "gone: no such"),
    ({"reward": {"weight": 0.0}}, "reward.weight: Input should be greater than 0"),
    ({"reward": {"terms": {"format": math.inf}}}, "reward.terms.format: Input should be a finite number"),
    ({"kind": "sft", "data": TREE["data"] | {"response": "answer"}, "reward": {}}, "kind=sft takes no reward"),
    (
        {"kind": "sft", "data": TREE["data"] | {"response": "answer"}, "teacher": {"path": "student", "decay": 0.5}},
        "kind=sft only compares with a teacher",
    ),
    ({"teacher": {"path": "student", "sources": ["one"]}}, "'one' is no name of data.mix (none: data has no mix)"),
    (MIX | {"more_teachers": [{"path": "student", "sources": ["three"]}]}, "'three' is no name of data.mix (one, two)"),
    (MIX | {"more_teachers": [{"path": "student"}]}, "needs sources, the names of data.mix that it teaches"),
    (MIX | {"more_teachers": [{"path": "student", "sources": ["one", "one"]}]}, "'one' has two teachers"),
    (MIX | {"teacher": {"path": "student", "sources": ["one"]}}, "nobody teaches two"),
    (MIX | {"more_teachers": [{"path": "gone", "sources": ["one"]}]}, "gone: no such"),
    (MIX | {"more_teachers": [{"path": "student", "sources": ["one"], "decay": 0.5}]}, "are for teacher alone"),
    (GRPO | {"more_teachers": [{"path": "student", "sources": ["one"]}]}, "more_teachers needs a teacher"),
    ({"teacher": {"path": "student", "context": "{problem} {answer}"}}, "record '1' has no answer"),
    ({"teacher": {"path": "student", "context": "{problem} {response}"}}, "record '0' has no response"),
    ({"teacher": {"path": "student", "context": "{problem} {solution}"}}, "{solution} is unknown"),
    ({"teacher": {"path": "student", "context": "{answer}"}}, "it does not hold {problem}"),
    ({"teacher": {"path": "student", "context": "{problem} {problem}", "max_context": 9}}, "teacher.max_context=9"),
    ({"off_policy": {"fraction": 0.5}}, "off_policy needs a column with responses"),
    ({"off_policy": {"fraction": 0.5, "data": NO_TEXT}, "rollout": EIGHT}, "no column text"),
    ({"off_policy": {"fraction": 0.3}}, "is no whole number of prompts"),
    ({"off_policy": {"fraction": 0.5}, "reward": {}}, "responses of a corpus have no sampling policy"),
    ({"teacher": {"path": "student", "cache": "scores"}}, "needs off_policy"),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_cli import tiny_model

    root = tmp_path_factory.mktemp("commands")
    tiny_model(root / "student")
    (root / "rows.jsonl").write_text(
        '{"problem": "1 * 1 mod 5 ?", "answer": "1"}\n{"problem": "2 * 2 mod 5 ?", "answer": ""}\n'
    )
    (root / "user.py").write_text(USER)
    return root


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_ends_the_command(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: Any, said: str
) -> None:
    """One message, code 2, no run directory."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "kept as it is")
    monkeypatch.chdir(root)
    (root / "run.yaml").write_text(yaml.safe_dump(TREE | changes))
    monkeypatch.setattr(sys, "argv", ["opd", "train", "run.yaml"])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not (root / "run").exists()


def test_a_context_may_hold_braces() -> None:
    for context in (r"{problem} \frac{answer}{response} $e^{abc}$ {x} {} {{", "{problem}", None):
        tree = TREE | {"teacher": {"path": "t", "context": context}}
        assert isinstance(parse_config(tree), Config)
