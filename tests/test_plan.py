"""opd plan: names, shapes and counts against independent ones; the compiler's word on what fits."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import STUDENT, TEACHER, run_config

from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig, Spec, forward, init_params, parameter_specs
from opd_jax.models.families import config_to_hf
from opd_jax.models.published import PUBLISHED, decoder_of
from opd_jax.plan import plan_run
from opd_jax.plan.compiling import Line, compile_line, wanted_bytes
from opd_jax.plan.cost import Cost, Sizes, forward_flops, loss_flops, step_costs
from opd_jax.plan.programs import OF_ROWS, Program, Programs
from opd_jax.plan.search import changed, nearest
from opd_jax.plan.topology import CHIPS, GIB, SHAPES, find_topology

NO_LIBTPU = importlib.util.find_spec("libtpu") is None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with a config.json alone: a plan reads nothing else."""
    import json

    root = tmp_path_factory.mktemp("shapes")
    for name, network in (("student", STUDENT), ("teacher", TEACHER)):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config_to_hf(network)))
    return root


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> None:
    """Before a plan can ask for another number of them."""
    assert len(jax.devices()) == 8 or jax.default_backend() != "cpu"


def settings(models: Path, **changes: Any) -> Config:
    changes = {"objective": {"name": "topk", "k": 4}} | changes
    return run_config(models, Path("never-made"), **changes)


EVALUATED: dict[str, Any] = {
    "evaluation": {"data": {"source": "x.jsonl", "max_prompt": 8}, "problems": 8, "batch": 8, "max_response": 12}
}


# names, shapes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e-4", "2x2"), ("v5e-8", "2x4"), ("v5e-16", "4x4"), ("v5e-64", "8x8"), ("v5e-256", "16x16"),
        ("v6e-16", "4x4"), ("v6e-32", "4x8"), ("v4-8", "2x2x1"), ("v5p-8", "2x2x1"), ("v5p-16", "2x2x2"),
        ("v5p-32", "2x2x4"), ("v5p-128", "4x4x4"), ("v5p-512", "4x8x8"),
    ],
)  # fmt: skip
def test_cloud_names(name: str, shape: str) -> None:
    assert SHAPES[name] == shape


def test_names_count_chips_or_cores() -> None:
    for name, shape in SHAPES.items():
        kind, count = name.split("-")
        assert math.prod(map(int, shape.split("x"))) * (1 if kind in ("v5e", "v6e") else 2) == int(count)


@pytest.mark.parametrize("name", ["v5e-17", "v7x-8", "cpu-0", "cpu", "tpu", ""])
def test_unknown_topology_names_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=r"did you mean (v|cpu|cuda).*v5e-N or v6e-N"):
        find_topology(name)


def test_more_cpu_devices_than_there_are() -> None:
    with pytest.raises(InputError, match="8 CPU devices"):
        find_topology("cpu-64")


@pytest.mark.exhaustive
def test_without_libtpu(models: Path, tmp_path: Path) -> None:
    """The command says what to install, with code 2 and no traceback."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run_dir: r\nsteps: 1\nstudent: {{path: {models}/student}}\nteacher: {{path: {models}/teacher}}\n"
        "data: {source: x.jsonl}\n"
    )
    hidden = "import sys; sys.modules['libtpu'] = None; from opd_jax.cli import main; main()"
    command = [sys.executable, "-c", hidden, "plan", str(config), "--topology", "v5e-16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'opd-jax[aot]'" in done.stderr
    assert "Traceback" not in done.stderr


CARDS = {  # 10⁹ parameters on the model cards; a tied head counts once
    "Qwen/Qwen3-0.6B": 0.596, "Qwen/Qwen3-1.7B": 1.72, "Qwen/Qwen3-1.7B-Base": 1.72, "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-4B-Base": 4.02, "Qwen/Qwen3-8B": 8.19, "Qwen/Qwen3-14B": 14.77, "Qwen/Qwen2.5-Math-1.5B": 1.54,
    "Qwen/Qwen2.5-Math-7B": 7.62, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1.78,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.62, "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.77,
    "hbx/JustRL-DeepSeek-1.5B": 1.78, "Skywork/Skywork-OR1-Math-7B": 7.62, "Skywork/Skywork-OR1-7B": 7.62,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_parameters_of_their_cards(name: str) -> None:
    found = decoder_of(name)
    specs = jax.tree.leaves(parameter_specs(found), is_leaf=lambda x: isinstance(x, Spec))
    assert sum(math.prod(s.shape) for s in specs) / 1e9 == pytest.approx(CARDS[name], abs=5e-3)
    # paper.md, vocabulary trap
    assert found.vocab_size == (152_064 if found.family == "qwen2" and found.width > 2000 else 151_936)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"did you mean Qwen/Qwen3-1.7B\?.*hbx/JustRL"):
        decoder_of("Qwen/Qwen3-1.7")


# memory


def test_a_tiny_run_on_simulated_devices(models: Path) -> None:
    """Bytes of arguments are those of the arrays that lie on a chip; the sum of a line is its peak."""
    result = plan_run(settings(models, mesh={"data": 1, "fsdp": 8}), "cpu-8", caches=())
    lines = {line["name"]: line for line in result["programs"]}
    assert list(lines) == [
        "weights for the rollout: ends",
        "weights for the rollout",
        "prefill",
        "prompts into slots",
        "rollout segment",
        "teacher scoring",
        "update",
    ]
    assert result["fits"]
    assert result["peak_bytes"] == max(line["total"] for line in lines.values() if line["needed"])
    specs = jax.tree.leaves(parameter_specs(STUDENT), is_leaf=lambda x: isinstance(x, Spec))
    weights = sum(4 * math.prod(s.shape) // (8 if "embed" in s.axes else 1) for s in specs)
    update = lines["update"]
    assert update["parts"]["master weights"] == weights
    assert update["parts"]["optimizer"] == pytest.approx(2 * weights, abs=64)  # two moments and the counts
    assert update["total"] == pytest.approx(sum(update["parts"].values()), rel=1e-3)  # what is not read is dropped
    assert update["aliased"] >= 3 * weights  # donated
    assert result["estimate"]["seconds_per_step"] is None
    assert all(stage["flops"] >= 0 for stage in result["estimate"]["stages"])


def test_a_line_that_does_not_fit_says_by_how_many_bytes(models: Path) -> None:
    programs = Programs(settings(models), make_mesh(), STUDENT, TEACHER)
    program, _ = programs.cast("weights", STUDENT, programs.state.params)
    whole = compile_line(program, 10**9)
    assert whole.fits
    short = compile_line(program, whole.total - 1000)
    assert (short.fits, short.over) == (False, 1000)


@pytest.mark.parametrize(
    ("message", "bytes_"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (298.12G) "
         "exceeds available HBM (15.75G).", 298.12 * GIB),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.00G of "
         "15.75G hbm. Exceeded hbm capacity by 4.25G.", 20.0 * GIB),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating. Used 20.00M of 16.00M", None),
        ("INTERNAL: something else (3.00G)", None),
    ],
)  # fmt: skip
def test_messages_of_the_compiler(message: str, bytes_: float | None) -> None:
    found = wanted_bytes(message, int(15.75 * GIB))
    assert found == (None if bytes_ is None else pytest.approx(bytes_, abs=2))


def test_an_out_of_memory_compilation_is_a_line_and_another_failure_is_not() -> None:
    def failing(message: str) -> Program:
        def lower() -> Any:
            raise jax.errors.JaxRuntimeError(message)

        return Program("update", lower, {"master weights": 5}, {"teacher": GIB}, ())

    line = compile_line(failing("RESOURCE_EXHAUSTED: (3.00G) exceeds available HBM (2.00G)"), 2 * GIB)
    assert line.total == 4 * GIB  # what stays on the chip comes on top
    assert line.over == 2 * GIB
    assert line.temp is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_line(failing("INTERNAL: a bug"), 2 * GIB)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [({"data": 16}, "does not fill 8 devices"), ({"data": 1, "tensor": 8, "fsdp": 1}, "heads")],
)
def test_a_mesh_that_cannot_be(models: Path, mesh: dict[str, int], message: str, monkeypatch: Any) -> None:
    narrow = dataclasses.replace(STUDENT, heads=4, kv_heads=4, head_dim=8)
    monkeypatch.setattr("opd_jax.plan.decoder_of", lambda path: narrow if "student" in path else TEACHER)
    with pytest.raises(InputError, match=message):
        plan_run(settings(models, mesh=mesh), "cpu-8")


# the search, with a compiler that is a formula


class Formula:
    """Lines by a made-up rule: rows a pass and remat decide about updates, slots about segments."""

    def __init__(self, usable: int, row: int, slot: int, weights: int):
        self.usable, self.row, self.slot, self.weights, self.calls = usable, row, slot, weights, 0

    def __call__(self, programs: Programs, names: list[str] | None, caches: Any = ()) -> list[Line]:
        self.calls += 1
        return [self.line(programs, p) for p in programs.all() if names is None or p.name in names]

    def line(self, programs: Programs, program: Program) -> Line:
        mesh = programs.layout.mesh.shape
        cache = 0
        if program.name in OF_ROWS:
            each = self.row if programs.config.remat == "full" else 4 * self.row
            size = each * programs.micro_batch // programs.shapes.shards
        elif "cache" in program.arguments:
            slots = programs.slots if "evaluation" not in program.name else programs.shapes.evaluation_rows()
            size = cache = self.slot * slots // mesh["fsdp"] // mesh["data"]
        else:
            size = 0
        total = size + self.weights // mesh["fsdp"] // mesh["tensor"]
        over = max(total - self.usable, 0)
        parts = {"cache": cache, "temp": total - cache}
        return Line(program.name, parts, 0, 0, 0, 0, 0, total, over, 0.0, 0.0, program.needed)


def search(models: Path, compile: Formula, **changes: Any) -> Any:
    config = settings(models, rollout={"prompts": 16, "samples": 4, "max_response": 10}, **EVALUATED, **changes)

    def build(config: Config) -> Programs:
        return Programs(config, make_mesh(**config.mesh.model_dump()), STUDENT, TEACHER)

    return nearest(config, build, compile, compile.usable, 8)


def test_smaller_passes_are_the_first_thing_tried(models: Path) -> None:
    found = search(models, Formula(10**6, row=200_000, slot=1, weights=0), remat="none", micro_batch=64)
    assert found.overrides == ["micro_batch=8"]  # one row a shard; 8 rows of 0.8 MB each would not fit


def test_the_largest_pass_that_fits(models: Path) -> None:
    found = search(models, Formula(10**6, row=200_000, slot=1, weights=0), remat="full", micro_batch=64)
    assert found.overrides == ["micro_batch=32"]  # 4 rows a shard of 0.2 MB


def test_then_remat(models: Path) -> None:
    found = search(models, Formula(10**6, row=900_000, slot=1, weights=0), remat="none", micro_batch=64)
    assert found.overrides == ["remat=full", "micro_batch=8"]


def test_then_sharding_and_slots_where_only_those_help(models: Path) -> None:
    found = search(models, Formula(10**6, row=1, slot=1, weights=4 * 10**6))
    assert found.overrides == ["mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1"]
    found = search(models, Formula(10**6, row=1, slot=400_000, weights=0))
    assert found.overrides == ["rollout.slots=16"]  # two a shard


def test_nothing_fits_and_the_search_ends(models: Path) -> None:
    compile = Formula(10**6, row=10**7, slot=1, weights=0)
    assert search(models, compile) is None
    assert compile.calls <= 16


def test_changes_are_validated(models: Path) -> None:
    with pytest.raises(InputError, match="micro_batch=7"):
        changed(settings(models), {"micro_batch": 7})


# counts


ONE_LAYER = DecoderConfig(
    "qwen3", 64, width=64, hidden=160, layers=1, heads=4, kv_heads=2, head_dim=32, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, qk_norm=True,
)  # fmt: skip


def test_flops_against_the_compiler_on_one_layer() -> None:
    """XLA adds elementwise work to the products, a few per cent here; all products are in the formula."""
    rows, columns = 2, 48
    shapes = jax.eval_shape(lambda: init_params(ONE_LAYER, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    lowered = jax.jit(lambda p, t: forward(p, ONE_LAYER, t, t, t)).lower(shapes, ids)
    cost: Any = lowered.compile().cost_analysis()
    counted = forward_flops(ONE_LAYER, rows * columns, rows * columns**2)
    assert counted < cost["flops"] < 1.12 * counted


def test_flops_against_a_count_by_hand() -> None:
    D, F, N, K, H = 64, 160, 4, 2, 32
    products = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F
    assert forward_flops(ONE_LAYER, 10, 0) == 2 * 10 * products
    assert forward_flops(ONE_LAYER, 0, 7) == 7 * (2 * N * H + 2 * N * H)  # scores, and the sum of values


@pytest.mark.parametrize(
    ("objective", "metrics", "products"),
    [
        ({"name": "full"}, True, 24 * (32 + 48) + 2 * 24 * 32),  # forward on both sides, two backward
        ({"name": "topk", "k": 4}, False, 4 * (2 * 32 + 48)),  # gathered rows only
        ({"name": "topk", "k": 4}, True, 24 * (32 + 48) + 4 * (2 * 32 + 48)),
    ],
)
def test_loss_flops(models: Path, objective: dict[str, Any], metrics: bool, products: int) -> None:
    config = run_config(models, Path("r"), objective=objective)
    assert loss_flops(config, STUDENT, TEACHER, 5, metrics=metrics) == 5 * 2 * products


def test_work_is_spread_over_the_chips(models: Path) -> None:
    one, eight = (Sizes(1, n, 1, micro_batch=8, mean_response=10.0) for n in (1, 8))
    costs = [step_costs(settings(models), STUDENT, TEACHER, sizes) for sizes in (one, eight)]
    for alone, shared in zip(*costs, strict=True):
        assert shared.flops == pytest.approx(alone.flops / 8)
        assert alone.links == 0
    assert sum(c.links for c in costs[1]) > 0
    assert [c.name for c in costs[0]] == [
        "weights for the rollout", "prefill", "rollout", "teacher scoring", "update"
    ]  # fmt: skip


def test_bound_by_the_slowest_resource() -> None:
    chip = CHIPS["v5e"]
    assert Cost("a", flops=197e12, memory=1e9, links=0).estimate(chip) == (pytest.approx(1 / 0.4), "compute")
    assert Cost("a", flops=1e9, memory=0.82e12, links=0).estimate(chip) == (pytest.approx(1 / 0.7), "memory bandwidth")
    serial = Cost("a", flops=197e12, memory=0.82e12, links=0, serial=True)
    assert serial.estimate(chip)[0] == pytest.approx(1 / 0.4 + 1 / 0.7)


# the compilers themselves


@pytest.mark.exhaustive
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu: pip install 'opd-jax[aot]'")
def test_for_a_tpu_that_is_not_there(models: Path, tmp_path: Path) -> None:
    """Both a configuration that fits v5e-16 and one whose cache does not, by the bytes that the cache alone exceeds."""
    sizes: Any = {"width": 256, "hidden": 512, "heads": 16, "kv_heads": 16, "head_dim": 64, "vocab_size": 1024}
    small, teacher = (dataclasses.replace(c, max_positions=1024, **sizes) for c in (STUDENT, TEACHER))
    import json

    for name, network in (("student", small), ("teacher", teacher)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config_to_hf(network)))
    config = run_config(
        tmp_path, Path("r"), dtype="bfloat16", mesh={"data": 1, "fsdp": 16}, micro_batch=16,
        objective={"name": "topk", "k": 4}, rollout={"prompts": 16, "samples": 1, "max_response": 1000},
    )  # fmt: skip
    result = plan_run(config, "v5e-16", caches=(4_000_000,))
    assert result["fits"]
    assert result["estimate"]["seconds_per_step"] > 0
    too_long = result["programs"][-1]
    cache = 2 * 4_000_040 * 2 * 16 * 64 * 2
    assert too_long["over"] >= cache - result["usable_bytes"]
    assert too_long["over"] == pytest.approx(cache - result["usable_bytes"], rel=0.05)


@pytest.mark.gpu
def test_predicted_peak_is_the_measured_one(tmp_path: Path) -> None:
    """``JAX_PLATFORMS=cuda pytest -m gpu tests/test_plan.py``, alone: the peak of a process cannot be reset."""
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU, or JAX_PLATFORMS is not cuda")
    network = dataclasses.replace(decoder_of("Qwen/Qwen3-0.6B"), layers=8)
    config = run_config(
        tmp_path, Path("r"), dtype="bfloat16", remat="full", micro_batch=4, objective={"name": "topk", "k": 16},
        rollout={"prompts": 8, "samples": 2, "max_response": 1536},
    )  # fmt: skip
    device = jax.devices()[0]
    programs = Programs(config, make_mesh(devices=[device]), network, network)
    line = compile_line(programs.update(), 10**12)

    def filled(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tree)

    state, teacher = filled(programs.state), filled(programs.weights)
    rows = filled(programs.shapes.sequences(config.rows))
    rows = rows.replace(segments=rows.segments + 1, depth=rows.depth)
    scores = programs.graphs.score(teacher, rows)  # pyright: ignore[reportOptionalCall]
    jax.block_until_ready(programs.graphs.update(state, rows, scores.hidden, frozen=scores.head))
    measured = (device.memory_stats() or {})["peak_bytes_in_use"]
    print(f"\npredicted {line.total / GIB:.3f} GiB, measured {measured / GIB:.3f}")
    assert line.total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ({"kind": "grpo", "teacher": None, "reward": {}}, False),
        ({"reward": {"terms": {"format": 1.0}}, "objective": {"name": "sampled"}}, True),
        ({"off_policy": {"fraction": 0.5, "data": {"source": "x.jsonl", "response": "r"}}}, True),
    ],
)
def test_a_plan_of_a_run_with_rewards_or_texts(models: Path, changes: dict[str, Any], scored: bool) -> None:
    """What is compiled is what such a run runs: GRPO has rollouts and no scoring."""
    lines = [line["name"] for line in plan_run(settings(models, **changes), "cpu-1", caches=())["programs"]]
    assert "rollout segment" in lines
    assert lines[-1] == "update"
    assert ("teacher scoring" in lines) == scored


def test_forms_that_are_not_planned(models: Path) -> None:
    with pytest.raises(InputError, match=r"objective\.scale are not planned.*largest teacher"):
        plan_run(settings(models, objective={"scale": 1.5}), "cpu-1", caches=())


def test_layouts_of_a_plan_are_those_of_a_run(models: Path) -> None:
    """Abstract arrays and real ones have the same shards."""
    mesh = make_mesh(1, 8, 1)
    programs = Programs(settings(models, mesh={"data": 1, "fsdp": 8}), mesh, STUDENT, TEACHER)
    real = init_params(STUDENT, jax.random.key(0), Layout(mesh))
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and a.shape == b.shape, real, programs.state.params)
    assert all(jax.tree.leaves(same))
    weights = programs.graphs.engine(STUDENT).cast(real)
    planned = programs.shapes.decode_weights(STUDENT)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding.shard_shape(a.shape), b.sharding.shard_shape(b.shape)),
                 weights, planned)  # fmt: skip
