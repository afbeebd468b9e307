"""The collapse alarm: quiet on noise and ordinary progress, loud within ten steps of a collapse, made up or real."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from opd_jax.checkpoints.export import export_run
from opd_jax.config import Config
from opd_jax.config_files import parse_config
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.tracking.run_dir import read_rows
from opd_jax.training import loop, optimizer
from opd_jax.training.alarm import FEWEST, RECENT, collapse
from opd_jax.training.loop import train

STEPS, TURN = 120, 60


def healthy(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """What a run that learns logs: overlap rises, entropy and gradients fall, with noise and single gradient spikes."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        done = step / STEPS
        spike = 20.0 if rng.random() < 0.05 else 1.0
        rows.append(
            {
                "step": step + 1,
                "overlap_ratio": 0.7 + 0.2 * done + 0.01 * rng.normal(),
                "truncation_rate": float(np.clip(0.3 - 0.2 * done + 0.04 * rng.normal(), 0, 1)),
                "response_length": float(300 * np.exp(-1.5 * done + 0.2 * rng.normal())),
                "gradient_norm": float(np.exp(-1 - 2 * done + 0.4 * rng.normal()) * spike),
                "student_entropy_by_position": [0.5 - 0.1 * done + 0.05 * x for x in rng.normal(size=8)] + [None, None],
            }
        )
    return rows


def collapsing(what: str, seed: int) -> list[dict[str, Any]]:
    rows = healthy(seed)
    for i, row in enumerate(rows[TURN:], start=1):
        if what == "entropy":  # from the end of the response forward
            row["student_entropy_by_position"][5:8] = [0.5 + 0.3 * i] * 3
        if what == "overlap":
            row["overlap_ratio"] -= 0.04 * i
        if what == "truncation":
            row["truncation_rate"] = min(1.0, row["truncation_rate"] + 0.1 * i)
        if what == "length":
            row["response_length"] = max(1.0, row["response_length"] * 0.7**i)
        row["gradient_norm"] *= 1 + i
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    rows = healthy(seed)
    assert all(collapse(rows[: i + 1]) is None for i in range(STEPS))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("entropy", "late-position entropy"),
        ("overlap", "overlap with"),
        ("truncation", "truncated responses"),
        ("length", "response length"),
    ],
)
def test_a_collapse_is_seen_within_ten_steps(what: str, name: str, seed: int) -> None:
    rows = collapsing(what, seed)
    seen = [i for i in range(STEPS) if collapse(rows[: i + 1])]
    assert TURN < seen[0] <= TURN + 10
    text = collapse(rows[: seen[0] + 1])
    assert text is not None
    assert name in text


def test_a_single_long_response_is_no_alarm() -> None:
    """Now and then one response goes on where the others have ended, at another entropy: it moves no level."""
    rows = healthy(0)
    for i, row in enumerate(rows):
        row["student_entropy_by_position"][8:] = [1.5, 1.5] if i % 20 >= 17 else [None, None]
    assert all(collapse(rows[: i + 1]) is None for i in range(STEPS))


def test_steps_without_metrics_do_not_dilute_the_level() -> None:
    """With ``metrics_every`` only some rows have an overlap."""
    rows = collapsing("overlap", 0)
    sparse = [row if i % 3 == 0 else {"step": row["step"], "gradient_norm": 1.0} for i, row in enumerate(rows)]
    seen = [i for i in range(STEPS) if collapse(sparse[: i + 1])]
    assert seen[0] > TURN
    assert collapse(sparse[:TURN]) is None


def test_a_short_history_says_nothing() -> None:
    rows = collapsing("truncation", 0)[TURN - 2 :]
    assert collapse(rows[: FEWEST + RECENT - 1]) is None
    assert collapse([]) is None


TASK, ONSET = "products-7x3", 15


def config_of(root: Path, name: str, kind: str, student: str, **settings: Any) -> Config:
    data = {"source": f"task:{TASK}", "chat": False, "max_prompt": 8, "limit": 4096}
    tree: dict[str, Any] = {
        "kind": kind,
        "run_dir": str(root / name),
        "student": {"path": str(root / student)},
        "data": data | ({"response": "response"} if kind == "sft" else {}),
        "rollout": {"prompts": 32, "samples": 1, "max_response": 18},
        "optimizer": {"lr": 3e-3, "b2": 0.95, "warmup": 20} if kind == "sft" else {"lr": 5e-4, "warmup": 5},
        "objective": {"k": 4},
        "checkpoint": {"every": 1000},
        "dtype": "float32",
        "remat": "none",
        "log_samples": 0,
    }
    if kind == "opd":
        tree["teacher"] = {"path": str(root / "teacher")}
    return parse_config(tree | settings)


@pytest.fixture(scope="module")
def learners(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's task with smaller numbers: a teacher, and as student the same model much earlier."""
    root = tmp_path_factory.mktemp("learners")
    vocab = write_task_tokenizer(root / "tokenizer", TASK)
    network = DecoderConfig(
        "llama", vocab, width=64, hidden=192, layers=2, heads=8, kv_heads=8, head_dim=8, norm_eps=1e-6, rope_theta=1e4,
        max_positions=64, tie_embeddings=True,
    )  # fmt: skip
    save_model(root / "start", init_params(network, jax.random.key(0)), network, tokenizer_from=root / "tokenizer")
    for steps, name in ((60, "student"), (160, "teacher")):
        train(config_of(root, "sft", "sft", "start", steps=steps), resume=name == "teacher")
        export_run(root / "sft", root / name)
    return root


def alarms(config: Config) -> list[tuple[int, str]]:
    train(config)
    rows = read_rows(epath.Path(config.run_dir) / "metrics.jsonl")
    return [(row["step"], row["alarm"]) for row in rows if row.get("alarm")]


@pytest.mark.long
def test_healthy_runs_raise_nothing(learners: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seeds, all of which learn."""
    prepare = loop.prepare
    built: list[Any] = []

    def prepare_with_the_first_graphs(config: Config) -> Any:  # or every seed would compile them again
        setup = prepare(config)
        built.append(setup)
        return dataclasses.replace(setup, graphs=built[0].graphs, rollout=built[0].rollout)

    monkeypatch.setattr(loop, "prepare", prepare_with_the_first_graphs)
    for seed in range(5):
        config = config_of(learners, f"healthy-{seed}", "opd", "student", steps=40, seed=seed)
        assert alarms(config) == []
        kls = [row["reverse_kl"] for row in read_rows(epath.Path(config.run_dir) / "metrics.jsonl")]
        assert np.mean(kls[-5:]) < 0.85 * np.mean(kls[:5])


@pytest.mark.long
@pytest.mark.parametrize("factor", [1000.0, -20.0], ids=["rate", "sign"])
def test_a_real_collapse_is_seen_within_ten_steps(
    learners: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """From one step on the learning rate is a thousand times as large, or the student climbs the divergence."""
    schedule = optimizer.make_schedule
    monkeypatch.setattr(
        optimizer,
        "make_schedule",
        lambda s, steps: lambda i: schedule(s, steps)(i) * jnp.where(i < ONSET, 1.0, factor),
    )
    found = alarms(config_of(learners, f"collapse{factor:g}", "opd", "student", steps=ONSET + 10))
    assert found
    assert ONSET < found[0][0] <= ONSET + 10
