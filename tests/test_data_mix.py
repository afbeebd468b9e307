"""``data.mix`` in a configuration: what a part inherits, overrides, and the message for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_jax.config import Data
from opd_jax.config_files import dump_config, load_config
from opd_jax.errors import InputError

RUN = """
run_dir: r
steps: 10
student: {path: s}
teacher: {path: t}
data:
  template: boxed
  problem: task
  limit: 9
  mix:
    one: {source: one.jsonl, weight: 0.7}
    two: {source: org/two, subset: main, split: test, problem: question, template: dapo, limit: 5}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def test_a_part_takes_from_the_section_what_it_leaves_out(run: Path) -> None:
    data = load_config(run).data
    common = {"problem": "task", "template": "boxed", "limit": 9}
    own = {"subset": "main", "split": "test", "problem": "question", "template": "dapo", "limit": 5}
    assert data.parts == {"one": Data(source="one.jsonl", **common), "two": Data(source="org/two", **own)}
    assert data.title == "one + two"
    single = Data(source="one.jsonl")
    assert (single.parts, single.title) == ({"": single}, "one.jsonl")


def test_overrides_and_round_trip(run: Path, tmp_path: Path) -> None:
    config = load_config(run, ["data.mix.one.weight=0.2", "data.mix.three.source=task:sums-1x2"])
    assert config.data.mix
    assert [(name, part.weight) for name, part in config.data.mix.items()] == [("one", 0.2), ("two", 1), ("three", 1)]
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert load_config(tmp_path / "again.yaml").data.parts == config.data.parts


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.source=a.jsonl", "data: give either source (one) or mix (several"),
        ("data.mix={}", "data: give either source (one) or mix (several"),
        ("data.mix=null", "data: give either source (one) or mix (several"),
        ("data.mix.one.weight=0", "data.mix.one.weight: Input should be greater than 0"),
        ("data.mix.one.weigth=1", "data.mix.one.weigth: unknown key; did you mean 'weight'?"),
        ("data.mix.one.chat=false", "data.mix.one.chat: unknown key"),
        ("data.mix.three.weight=1", "data.mix.three.source: required"),
        ("data.mix={a b: {source: x}}", "String should match pattern"),
        ("data.mix={source: {source: x, wait: 1}}", "data.mix.source.wait: unknown key"),
        ("data.mix=[a.jsonl]", "data.mix: Input should be a valid dictionary"),
    ],
)
def test_mistakes_are_named(run: Path, override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(run, [override])
    assert said in str(caught.value)
