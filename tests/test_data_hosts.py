"""A mixture over several epochs, trained by two processes, one of which is killed: the data of one unbroken process."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from test_hosts import assert_same_numbers, config_of, finish, root, rows, start  # noqa: F401 (root is a fixture)

from opd_jax.config import Config
from opd_jax.training.loop import train


def mixed(root: Path, name: str) -> Config:  # noqa: F811
    """Four steps of four prompts: about two epochs of either source."""
    parts: dict[str, Any] = {}
    for part, numbers, weight in (("a", range(1, 6), 0.6), ("b", range(6, 9), 0.4)):
        problems = [{"problem": f"{n % 4 + 1} * {n // 4 + 1} mod 5 ?"} for n in numbers]
        (root / f"{part}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
        parts[part] = {"source": str(root / f"{part}.jsonl"), "weight": weight}
    return config_of(root, name, data={"mix": parts, "chat": False, "max_prompt": 8})


@pytest.mark.long
def test_a_mixture_goes_on_after_a_kill_of_one_of_two_processes(root: Path) -> None:  # noqa: F811
    one = mixed(root, "mixed-one")
    train(one)
    two = mixed(root, "mixed-two")
    code, _ = finish(start(root, two, 2, at=(1, 3), number=signal.SIGKILL))
    assert code not in (0, 2, 3)
    code, out = finish(start(root, two, 2, "--resume"))
    assert code == 0, out
    assert_same_numbers(Path(two.run_dir), Path(one.run_dir))
    epochs = [(row["epoch/a"], row["epoch/b"]) for row in rows(Path(one.run_dir), "metrics")]
    assert epochs == [(row["epoch/a"], row["epoch/b"]) for row in rows(Path(two.run_dir), "metrics")]
    assert epochs[-1][0] * 5 + epochs[-1][1] * 3 == pytest.approx(16)
    assert min(epochs[-1]) > 1.5
