"""Configuration: YAML and overrides in, one typed object out, or one message that names every wrong leaf."""

from __future__ import annotations

import functools
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from opd_jax.config import Config, Data, Part, Strict
from opd_jax.config_files import dump_config, load_config, parse_data
from opd_jax.errors import InputError

ROOT = Path(__file__).parents[1]
MINIMAL = """
run_dir: runs/x
steps: 10
student: {path: s}
teacher: {path: t}
data: {source: task:products-5x2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def refused(file: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def test_defaults_are_those_of_the_paper(file: Path) -> None:
    c = load_config(file)
    assert (c.rollout.prompts, c.rollout.samples, c.rollout.max_response, c.data.max_prompt) == (64, 4, 7168, 1024)
    assert (c.rollout.temperature, c.rollout.top_p, c.rollout.top_k, c.objective.k) == (1.0, 1.0, 0, 16)
    o = c.optimizer
    assert (o.lr, o.b1, o.b2, o.eps, o.weight_decay, o.clip) == (1e-6, 0.9, 0.999, 1e-8, 0.01, 1.0)
    assert (o.schedule, o.warmup, c.objective.temperature) == ("constant", 0, 1.0)


def test_overrides_are_yaml_and_create_sections(file: Path) -> None:
    c = load_config(
        file,
        [
            *("optimizer.lr=1e-5", "optimizer.eps=1.5E-8", "rollout.samples=2", "objective.name=topk"),
            *("objective.tail=true", "data.problem=null", "evaluation.data.source=a.jsonl", "run_dir=gs://bucket/run"),
            *("data.template='{problem}=?'", "data.chat_arguments={enable_thinking: false}"),
        ],
    )
    assert c.optimizer.lr == 1e-5
    assert c.optimizer.eps == 1.5e-8
    assert (c.rollout.samples, c.objective.name, c.objective.tail, c.data.problem) == (2, "topk", True, None)
    assert c.evaluation.data
    assert c.evaluation.data.source == "a.jsonl"
    assert c.data.chat_arguments == {"enable_thinking": False}
    assert (c.run_dir, c.data.template) == ("gs://bucket/run", "{problem}=?")


def test_later_overrides_win(file: Path) -> None:
    assert load_config(file, ["steps=3", "steps=4"]).steps == 4


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("rollout.max_respons=1", "rollout.max_respons: unknown key; did you mean 'max_response'?"),
        ("evaluation.data.sorce=a", "evaluation.data.sorce: unknown key; did you mean 'source'?"),
        ("teacher.pathh=a", "teacher.pathh: unknown key; did you mean 'path'?"),
        ("zzz=1", "zzz: unknown key; expected one of"),
        ("steps=many", "steps: Input should be a valid integer (found 'many')"),
        ("steps=1.5", "steps: Input should be a valid integer"),
        ("steps=0", "steps: Input should be greater than or equal to 1 (found 0)"),
        ("steps=3000000000", "steps: Input should be less than"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number (found 'fast')"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.b2=1.0", "optimizer.b2: Input should be less than 1"),
        ("rollout.top_p=0", "rollout.top_p: Input should be greater than 0"),
        ("remat='yes'", "remat: Input should be 'none', 'dots', 'full' or 'offload'"),
        ("seed=true", "seed: Input should be a valid integer"),
        ("dtype=fp16", "dtype: Input should be 'float32' or 'bfloat16' (found 'fp16')"),
        ("objective.name=topp", "objective.name: Input should be 'sampled', 'full', 'topk' or 'topk_reference'"),
        ("rollout=3", "rollout: expected a section of settings, found 3"),
        ("rollout=[1, 2]", "rollout: expected a section of settings, found [1, 2]"),
        ("student.path=", "student.path: Input should be a valid string (found None)"),
        ("data.chat_arguments={1: 2}", "data.chat_arguments"),
        ("data.chat_arguments={when: 2024-01-01}", "data.chat_arguments.when"),
    ],
)
def test_wrong_leaf_is_named(file: Path, override: str, named: str) -> None:
    message = refused(file, override)
    assert named in message
    assert str(file) in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher=null"], "kind=opd needs teacher.path"),
        (["kind=sft"], "kind=sft needs data.response"),
        (["optimizer.schedule=wsd"], "optimizer: schedule=wsd with decay=0"),
        (["objective.correction=tis"], "weights a policy gradient"),
        (["rollout.prompts=3", "rollout.samples=1", "micro_batch=2"], "micro_batch=2 does not divide"),
        (["objective.name=topk", "objective.tail=true", "objective.normalise=false"], "tail=true"),
        (["objective.name=sampled", "objective.divergence=jsd"], "reverse-KL gradient"),
        (["rollout.length={start: 9, end: 7169, steps: 3}"], "rollout.length.end=7169 is beyond rollout.max_response"),
        (["positions.skip=5", "positions.horizon={start: 9, end: 5, steps: 3}"], "of the first 5 tokens"),
    ],
)
def test_contradictions(file: Path, overrides: list[str], said: str) -> None:
    assert said in refused(file, *overrides)


@pytest.mark.parametrize("item", ["steps", "=3", "steps.deep=3", "data.source.x=3", "steps=[1"])
def test_malformed_override_is_quoted(file: Path, item: str) -> None:
    assert f"override '{item}'" in refused(file, item)


def test_all_errors_come_at_once(file: Path) -> None:
    message = refused(file, text="steps: none\nstudent: {}\nrun_dir: 3\n")
    assert "4 problem(s)" in message
    for leaf in ("steps: Input", "student.path: required", "run_dir: Input", "data: required"):
        assert leaf in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("steps: 3\nsteps: 4", "'steps' stands twice"),
        ("data: {source: a, source: b}", "'source' stands twice"),
        ("2024-99-99: 1", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: &a [*a]", "unknown key"),
        (MINIMAL.replace("5x2", "5x2, chat_arguments: &a {b: *a}"), "data.chat_arguments"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_malformed_files(file: Path, text: str, said: str) -> None:
    message = refused(file, text=text)
    assert said in message
    assert str(file) in message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("steps: 3 # é".encode("latin-1"))
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml", "a\0b"):
        with pytest.raises(InputError, match="cannot read the configuration"):
            load_config(path)


def test_anchors_and_merges_work(file: Path) -> None:
    text = MINIMAL.replace("data: {", "data: &data {") + "evaluation: {data: {<<: *data, split: test}}\n"
    file.write_text(text)
    c = load_config(file)
    assert c.evaluation.data
    assert (c.evaluation.data.source, c.evaluation.data.split) == ("task:products-5x2", "test")


CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "paper").glob("*.yaml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert config.run_dir == str("runs" / path.relative_to(ROOT / "configs").with_suffix(""))
    assert "Hardware:" in path.read_text().partition("\nkind:")[0]


@pytest.mark.parametrize("text", ["1e-6", "1", "true", "null", "2024-01-01", "a: b", "é\n", ""])
def test_text_that_looks_like_something_else_survives_a_round_trip(file: Path, text: str) -> None:
    config = load_config(file)
    config = config.model_copy(update={"run_dir": text})
    file.write_text(dump_config(config))
    assert load_config(file) == config


def leaves(model: type[Strict], prefix: str = "") -> list[str]:
    out = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        out += leaves(section, f"{prefix}{name}.") if section else [prefix + name]
    return out


def section_of(field: Any) -> type[Strict] | None:
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    kinds += [k for kind in kinds for k in typing.get_args(kind)]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Strict)), None)


def knobs(model: type[Strict]) -> set[str]:
    """Settings below a section; one that stands in several places, as Data and Teacher do, counts once."""
    out: set[str] = set()
    for name, field in model.model_fields.items():
        section = section_of(field)
        # a part of a mixture overrides settings of its section: only its weight is a new one
        out |= {"Part.weight"} if section is Part else knobs(section) if section else {f"{model.__name__}.{name}"}
    return out


def test_few_knobs() -> None:
    names = knobs(Config)
    assert {"Optimizer.lr", "Data.source", "Teacher.decay", "Model.path"} <= names
    assert len(names) <= 105, (len(names), sorted(names))


def test_frozen(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0


def test_off_is_a_text(file: Path) -> None:
    """YAML 1.1 reads on, off, yes and no as booleans."""
    assert load_config(file, ["alarm=off"]).alarm == "off"
    assert load_config(file, ["data.chat=false"]).data.chat is False
    assert "data.chat: Input should be a valid boolean (found 'no')" in refused(file, "data.chat=no")


def test_parse_data() -> None:
    assert parse_data("a.jsonl", ["split=test"]).split == "test"
    with pytest.raises(InputError, match="did you mean 'template'"):
        parse_data("a.jsonl", ["templat=boxed"])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["full", "topk", "sft", "opd", "a.jsonl", "1e-6", "float32"])
)
KEYS = st.sampled_from([n for leaf in leaves(Config) for n in leaf.split(".")]) | st.text(max_size=4) | st.integers()
TREES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=6), max_leaves=20)


def loads_or_refuses(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except InputError:
        return
    path.write_text(dump_config(config))
    assert load_config(path) == config


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="abe:{}[]&*!<>|-'\"#%@\n 01.,?_", max_size=60) | st.text(max_size=40))
@example(text="!!timestamp x: 1")
@example(text="._: 1")
@example(text="? [1]\n: 2")
@example(text="<<: 3")
@example(text="a: !!binary ~")
@example(text="1" * 5000)
def test_any_text_loads_or_is_refused(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    loads_or_refuses(path, [])


@settings(max_examples=100, deadline=None)
@given(
    tree=st.dictionaries(st.sampled_from(list(Config.model_fields)), TREES, max_size=5),
    overrides=st.lists(
        st.tuples(st.sampled_from([*leaves(Config), "a", "data", ".", "data."]), st.text(max_size=6)), max_size=3
    ),
)
def test_any_tree_loads_or_is_refused(
    tree: dict[str, Any], overrides: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(MINIMAL) | tree))
    loads_or_refuses(path, [f"{key}={value}" for key, value in overrides])


SHIPPED = [load_config(path) for path in CONFIGS]


def nodes(tree: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all sections and leaves."""
    children = tree.items() if isinstance(tree, dict) else ()
    return [path for key, child in children for path in [(*at, key), *nodes(child, (*at, key))]]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A shipped configuration in which sections or leaves are replaced, renamed, removed or joined by others."""
    tree = yaml.safe_load(dump_config(draw(st.sampled_from(SHIPPED))))
    for _ in range(draw(st.integers(1, 3))):
        *parents, leaf = draw(st.sampled_from(nodes(tree) or [("steps",)]))
        section = functools.reduce(lambda node, key: node[key], parents, tree)
        what = draw(st.sampled_from(["value", "name", "nothing", "more"]))
        old = None if what == "more" else section.pop(leaf, None)
        if what != "nothing":
            section[leaf if what == "value" else draw(KEYS)] = old if what == "name" else draw(TREES)
    return tree


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=mutated())
def test_any_change_of_a_configuration_loads_or_is_refused(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))
    loads_or_refuses(path, [])


@settings(max_examples=60, deadline=None)
@given(
    source=st.text(max_size=8),
    values=st.dictionaries(st.sampled_from(list(Data.model_fields)) | st.text(max_size=4), TREES, max_size=3),
)
def test_any_data_section_is_read_or_refused(source: str, values: dict[str, Any]) -> None:
    overrides = [f"data.{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()]
    try:
        parse_data(source, overrides)
    except InputError:
        return
