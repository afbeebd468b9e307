"""The code in docs/ runs, block after block in one namespace, on tiny random models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from test_cli import tiny_model

from opd_jax.config_files import parse_config
from opd_jax.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
def test_python_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model(Path("models/student"), width=16)
    tiny_model(Path("models/teacher"), width=32, head_dim=16)
    text = (DOCS / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, "docs/python.md", "exec"), names)
        if "loss" in names:
            assert np.isfinite(names["loss"])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), names["params"], jax.device_get(names["state"].params))
    assert all(jax.tree.leaves(changed))
    assert int(names["state"].step) == 1
    assert int(names["state"].skipped) == 0


def test_configurations_of_further_forms() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "objectives.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    for block in map(yaml.safe_load, blocks):
        if "stages" in block:
            assert [stage.kind for stage in Recipe.model_validate(block).stages] == [
                "generate", "filter", "train", "train"]  # fmt: skip
            continue
        whole = {"run_dir": "run", "steps": 3, "student": {"path": "s"}, "data": {"source": "a.jsonl"}} | block
        if "kind" not in block:
            whole |= {"teacher": block.get("teacher", {"path": "t"})}
        parse_config(whole)
