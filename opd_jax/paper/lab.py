"""Models and runs of one domain and one seed. Each is named by what it is and made once: its directory's name holds a
hash of the settings and of all that it was made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from filelock import FileLock

from opd_jax.checkpoints.export import export_run
from opd_jax.config import Data
from opd_jax.config_files import parse_config
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.generate import generate_file
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.paper.presets import Domain, Preset
from opd_jax.sampling.law import Law
from opd_jax.tracking.run_dir import read_rows, write_atomically
from opd_jax.training.loop import train

Row = dict[str, Any]

VERSION = 7  # of what a run means beyond its settings (corpora, networks, code); a change makes all of them anew
CURVES = (
    "accuracy", "overlap_ratio", "overlap_mass_student", "overlap_advantage", "entropy_gap", "student_entropy",
    "reverse_kl", "forward_kl_teacher_rollouts", "response_length",
)  # fmt: skip
STEPS = ("loss", "gradient_norm", "overlap_ratio", "entropy_gap", "student_entropy")
POINTS = 20  # of a curve over steps
COSTS = ("time/rollout", "time/score", "time/update", "update_flops")  # seconds, operations; medians over steps


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    path: Path
    key: str  # hash of what it was made from


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training run: what its evaluations and steps said, and its student."""

    evaluations: list[Row]
    steps: list[Row]
    cpu_seconds: float
    model: Model

    @property
    def teacher(self) -> Row:
        return next(row for row in self.evaluations if row["who"] == "teacher")

    def curve(self, name: str) -> list[float]:
        """Of the student, by evaluation."""
        return [row[name] for row in self.evaluations if row["who"] == "student"]

    def row(self) -> Row:
        """What an experiment keeps of it."""
        held = [row for row in self.evaluations if row["who"] == "student"]
        teacher = [row["accuracy"] for row in self.evaluations if row["who"] == "teacher"]

        def measured(name: str) -> list[np.ndarray]:
            """Values of the steps that have it, in at most ``POINTS`` groups."""
            values = np.array([row[name] for row in self.steps if name in row], float)
            return np.array_split(values, min(POINTS, len(values))) if len(values) else []

        def of_bins(values: np.ndarray) -> list[float]:
            return [_rounded(x) for x in np.nanmean(values[:, np.isfinite(values).any(axis=0)], axis=0)]

        row: Row = {
            "step": [row["step"] for row in held],
            "evaluations": {n: [_rounded(row[n]) for row in held] for n in CURVES if n in held[-1]},
            "steps": {name: [_rounded(x.mean()) for x in found] for name in STEPS if (found := measured(name))},
            "teacher_accuracy": teacher[0] if teacher else None,
            "cost": {n: _rounded(np.median([r[n] for r in self.steps])) for n in COSTS if n in self.steps[-1]},
        }
        if found := measured("student_entropy_by_position"):
            row["student_entropy_by_position"] = [of_bins(found[0]), of_bins(found[-1])]
        return row


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    """Where the models of a seed are made. ``zoo`` names those that several experiments share."""

    domain: Domain
    preset: Preset
    seed: int
    root: Path  # one for all seeds: models are found by content

    def random(self, width: int, start: int = 0) -> Model:
        """``start``: another has other numbers."""
        sizes = {"width": width, "layers": self.preset.layers, "task": self.domain.task, "seed": self.seed}
        key = _hash([VERSION, sizes, start])
        place = self.root / f"random-{key}"
        tokenizer = self.root / f"tokenizer-{_hash([VERSION, self.domain.task])}-{self.seed}"
        with _alone(tokenizer):
            if not place.exists():
                vocab_size = write_task_tokenizer(tokenizer, self.domain.task)
                network = DecoderConfig(
                    "llama", vocab_size, width=width, hidden=3 * width, layers=self.preset.layers, heads=4, kv_heads=4,
                    head_dim=width // 4, norm_eps=1e-6, rope_theta=1e4, max_positions=256, tie_embeddings=True,
                )  # fmt: skip
                params = init_params(network, jax.random.key(1000 * self.seed + start))
                save_model(place, params, network, tokenizer_from=tokenizer)
        return Model("random", place, key)

    def sft(self, name: str, student: Model, data: Row, steps: int, lr: float, made_from: str = "") -> Run:
        """Imitation of the response column of ``data``."""
        settings = {
            "kind": "sft",
            "steps": steps,
            "data": self.domain.prompts | data | {"response": "response"},
            "rollout": {"prompts": 64, "samples": 1, "max_response": self.domain.response},
            "optimizer": {"lr": lr, "b2": 0.95, "schedule": "cosine", "warmup": min(20, steps // 2)},
        }
        return self._run(name, settings, student, made_from=made_from)

    def grpo(self, name: str, student: Model, data: Row, steps: int, prompts: int, samples: int = 8) -> Run:
        """Reward for right answers alone (paper A.1)."""
        settings = {
            "kind": "grpo",
            "steps": steps,
            "data": self.domain.prompts | data,
            "reward": {"terms": {"answer": 1.0}},
            "objective": {"k": self.domain.k, "correction": "tis"},
            "rollout": {"prompts": prompts, "samples": samples, "max_response": self.domain.response},
            "optimizer": {"lr": self.preset.lr, "warmup": 5, "schedule": "cosine"},
        }
        return self._run(name, settings, student)

    def opd(self, name: str, student: Model, teacher: Model, settings: Row | None = None) -> Run:
        """On-policy distillation; ``settings`` (by section) are what differs from the defaults of all experiments."""
        given = settings or {}
        defaults = {
            "steps": self.preset.steps,
            "objective": {"name": "topk", "k": self.domain.k},
            "metrics_k": self.domain.k,
            "metrics_every": max(1, self.preset.steps // POINTS),  # they are a third of a step
            "data": self.domain.prompts | self.domain.main,
            "rollout": {"prompts": self.preset.prompts, "samples": 1, "max_response": self.domain.response},
            "optimizer": {"lr": self.preset.lr, "warmup": 5, "schedule": "cosine"},
        }
        merged = {
            name: defaults.get(name, {}) | given.get(name, {})
            if isinstance(defaults.get(name, given.get(name)), dict)
            else given.get(name, defaults.get(name))
            for name in {**defaults, **given}
        }
        return self._run(name, merged, student, teacher)

    def responses(self, model: Model, count: int) -> tuple[Row, str]:
        """What a model answers to training problems, truncated responses left out (paper C.1), as data to imitate, and
        the hash of what it is made from."""
        key = _hash([model.key, count, self.seed])
        out, whole = self.root / f"responses-{key}.jsonl", self.root / f"responses-{key}-whole.jsonl"
        data = Data.model_validate(self.domain.prompts | self.domain.main | {"limit": count})
        with _alone(whole):
            if not whole.exists():
                generate_file(
                    model.path, data, out, samples=1, problems=None, max_response=self.domain.response, law=Law(1.0),
                    slots=256, seed=self.seed, dtype="float32", resume=out.exists(),
                )  # fmt: skip
                lines = out.read_text().splitlines(keepends=True)
                ended = (line for line in lines if json.loads(line)["finish_reason"] == "stop")
                write_atomically(epath.Path(whole), "".join(ended))
        # an untrained model may say nothing
        return {"source": str(whole), "template": self.domain.main["template"], "skip_bad": True}, key

    def kept(self, name: str, models: Sequence[Model], measure: Callable[[], Row]) -> Row:
        """What was measured on models; from its file where it has been."""
        path = self.root / f"{name}-{self.seed}-{_hash([VERSION, self.preset.rollouts, *(m.key for m in models)])}.json"
        with _alone(path):
            if not path.exists():
                write_atomically(epath.Path(path), json.dumps(measure()) + "\n")
        return json.loads(path.read_text())

    def held_out(self, data: Row, problems: int = 0) -> Row:
        """Its problems to be examined on; 0: as many as for most runs."""
        return self.domain.prompts | data | {"split": "test", "limit": problems or self.preset.problems}

    def _run(self, name: str, settings: Row, student: Model, teacher: Model | None = None, made_from: str = "") -> Run:
        common = {
            "seed": self.seed,
            "evaluation": {
                "data": self.held_out(self.domain.main),
                "problems": self.preset.problems,
                "batch": 256,
                "every": max(1, settings["steps"] // self.preset.evaluations),
                "max_response": self.domain.response,
            },
            "checkpoint": {"every": 500, "keep": 1},
            "dtype": "float32",
            "remat": "none",
            "log_samples": 1,
        }
        config = common | {n: v for n, v in settings.items() if n != "evaluation"}
        config["evaluation"] = common["evaluation"] | settings.get("evaluation", {})
        data = {n: v for n, v in config["data"].items() if not (n == "source" and made_from)}
        key = _hash([VERSION, config | {"data": data}, made_from, student.key, teacher.key if teacher else None])
        place = self.root / f"{name}-{self.seed}-{key}"
        run_dir, result = place / "run", place / "result.json"
        with _alone(place):
            if not result.exists():
                config |= {"run_dir": str(run_dir), "student": {"path": str(student.path)}}
                if teacher:
                    config["teacher"] = {"path": str(teacher.path)}
                began = time.process_time()
                resume = (run_dir / "config.yaml").exists()
                rows = train(parse_config(config), resume=resume, title=f"{name} {self.seed}", report=False)
                if not (place / "model").exists():
                    export_run(str(run_dir), str(place / "model"))
                row = {"evaluations": rows, "cpu_seconds": time.process_time() - began}
                write_atomically(epath.Path(result), json.dumps(row) + "\n")
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        held = json.loads(result.read_text())
        steps = read_rows(epath.Path(run_dir) / "metrics.jsonl")
        return Run(held["evaluations"], steps, held["cpu_seconds"], Model(name, place / "model", key))


def _alone(place: Path) -> FileLock:
    """Held while a thing is made: of several processes one makes it, and the others wait for it."""
    return FileLock(place.with_name(f"{place.name}.lock"))


def _rounded(value: Any) -> float:
    return float(f"{value:.5g}")


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
