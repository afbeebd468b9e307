"""How large the miniature is, and its two domains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of models and runs; the same for all domains, experiments and seeds."""

    width: int
    layers: int
    large_width: int  # of the larger teacher of the same pipeline
    pretrain: int  # steps of SFT from random weights, 64 texts each
    large_pretrain: int
    cold: int  # steps of SFT on the teacher's responses (§5.1)
    grpo: int  # steps
    grpo_prompts: int  # a step, 8 responses each
    steps: int  # of a distillation
    prompts: int  # a step, one response each
    lr: float  # of distillation and GRPO
    rows: int  # of training data, of each source
    problems: int  # held out
    evaluations: int  # of a run, beside the first
    corners: int  # of the polygon (folds)
    numbers: int  # in a problem
    rollouts: int  # that an analysis looks at


PRESETS = {
    "smoke": Preset(
        width=32, layers=1, large_width=32, pretrain=200, large_pretrain=20, cold=2, grpo=2, grpo_prompts=2, steps=3,
        prompts=8, lr=1e-3, rows=512, problems=16, evaluations=1, corners=3, numbers=4, rollouts=64,
    ),
    "mini": Preset(
        width=128, layers=2, large_width=192, pretrain=1200, large_pretrain=1000, cold=300, grpo=150, grpo_prompts=16,
        steps=60, prompts=64, lr=7e-4, rows=16_384, problems=1024, evaluations=3, corners=5, numbers=8, rollouts=256,
    ),
    "full": Preset(
        width=256, layers=4, large_width=384, pretrain=3000, large_pretrain=2000, cold=400, grpo=400, grpo_prompts=32,
        steps=200, prompts=128, lr=3e-4, rows=16_384, problems=2048, evaluations=8, corners=6, numbers=12, rollouts=512,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Domain:
    """Data of one kind of problem. All prompts of the experiments have the same template, but where it is varied."""

    name: str
    task: str  # whose words the tokenizer has
    k: int  # of the lists of most probable tokens
    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response
    rows: int  # of each source
    corpus: Row  # what student and larger teacher imitate: facts are shaky
    main: Row  # what teachers are made on, students learn from and are examined on; its responses know the facts
    variants: Mapping[str, Row]  # of main, for the experiments that are made on folds alone

    @property
    def prompts(self) -> Row:
        return {"chat": False, "max_prompt": self.prompt, "limit": self.rows}


TEMPLATE = "so {problem}"  # of the teacher's own prompts (§5.2); the corpus also has problems without it


def folds(preset: Preset) -> Domain:
    """Products in a finite group, ``data/folds.py``: five tokens a step and three at the end. The template asks for a
    fold from the left; without it the corpus folds from the right."""
    kind, n = f"dihedral-{preset.corners}x{preset.numbers}", preset.numbers

    def task(suffix: str = "", **settings: Any) -> Row:
        return {"source": f"task:{kind}{suffix}", "template": TEMPLATE} | settings

    parts = {"main": task("-shaky", weight=2.0), "bare": task("-shaky-right", template="plain")}
    variants = {
        "other": task("-middle"),  # texts of somebody who knows the facts and thinks otherwise
        "bare": task(template="plain"),
        "rotations": task("-rotations"),
    }
    return Domain(
        "folds", kind, 16, n + 2, 5 * (n - 1) + 3, preset.rows,
        corpus={"mix": parts}, main=task(), variants=variants,
    )  # fmt: skip


def products(preset: Preset) -> Domain:
    """Products modulo a prime, ``data/tasks.py``: six tokens a step and two at the end. Lists of 8 hold all of the
    connectives, which the corpus uses evenly."""
    modulus, n = (13, 5) if preset.numbers > 4 else (5, 3)

    def task(suffix: str = "", **settings: Any) -> Row:
        return {"source": f"task:products-{modulus}x{n}{suffix}", "template": TEMPLATE} | settings

    parts = {"main": task("-shaky", weight=2.0), "bare": task("-shaky", template="plain")}
    return Domain(
        "products", f"products-{modulus}x{n}", 8, 2 * n + 3, 6 * (n - 1) + 3, preset.rows,
        corpus={"mix": parts}, main=task(), variants={},
    )  # fmt: skip


DOMAINS = {"folds": folds, "products": products}
