"""Rewards of whole responses: right answers, format, length, and Python functions of one's own."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd_jax.config import Reward
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool, find_answer

START_LIMIT = 120.0  # seconds to import the module of a function of one's own
_ALONE = "a function of one's own is given as MODULE:FUNCTION"

log = logging.getLogger(__name__)


class Judged(NamedTuple):
    """What a reward sees of one response."""

    id: str  # of the prompt, for messages
    problem: str
    answer: str | None
    response: str
    tokens: int
    stopped: bool  # False: cut at the limit


class Judge:
    """``judge(rows) → {term: [n]}``, float64; NaN where a function of one's own failed and ``skip_bad`` is set.

    Args:
        max_response: tokens, for the length term.

    Raises:
        InputError: an unknown term, or a function that cannot be imported.
    """

    def __init__(self, reward: Reward, max_response: int):
        self.reward = reward
        self._pool = AnswerPool(fallback_number=reward.fallback_number)
        self._workers: dict[str, _Function] = {}
        known: dict[str, Callable[[Sequence[Judged]], np.ndarray]] = {
            "answer": self._answer,
            "format": self._format,
            "length": lambda rows: length_penalty([r.tokens for r in rows], max_response, reward.buffer),
        }
        self._terms = {}
        for name in reward.terms:
            if name not in known and ":" not in name:
                raise InputError(f"reward.terms: unknown term '{name}'. Expected {', '.join(known)}; {_ALONE}.")
            if name in known:
                self._terms[name] = known[name]
            else:
                worker = self._workers[name] = _Function(name, reward.limit)
                self._terms[name] = lambda rows, w=worker: w(rows, skip_bad=reward.skip_bad)

    def __call__(self, rows: Sequence[Judged]) -> dict[str, np.ndarray]:
        return {name: np.asarray(term(rows), np.float64) for name, term in self._terms.items()}

    def total(self, terms: dict[str, np.ndarray]) -> np.ndarray:
        """Σ weight · term of each response."""
        return sum((weight * terms[name] for name, weight in self.reward.terms.items()), np.zeros(()))

    def close(self) -> None:
        self._pool.__exit__()
        for worker in self._workers.values():
            worker.stop()

    def _answer(self, rows: Sequence[Judged]) -> np.ndarray:
        pairs = [(row.response, str(row.answer)) for row in rows]
        return np.array([verdict.correct for verdict in self._pool.judge(pairs)])

    def _format(self, rows: Sequence[Judged]) -> np.ndarray:
        return np.array([find_answer(row.response)[1] != "none" for row in rows])


def length_penalty(tokens: Sequence[int], limit: int, buffer: int) -> np.ndarray:
    """0 up to limit − buffer tokens, then falling to −1 at the limit (Yu et al. 2025, DAPO: overlong punishment)."""
    buffer = min(buffer, limit)
    return -np.clip((np.asarray(tokens, np.float64) - (limit - buffer)) / buffer, 0.0, 1.0)


class _Function:
    """A function of one's own in a process of its own, which is killed where a call takes too long."""

    def __init__(self, name: str, limit: float):
        self._name, self._limit = name, limit
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __call__(self, rows: Sequence[Judged], skip_bad: bool) -> list[float]:
        values, faults = [], []
        for row in rows:
            value, fault = self._ask(row)
            if fault:
                faults.append(f"reward.terms.{self._name}: prompt {row.id!r}: {fault}.")
                if not skip_bad:
                    mend = "Mend the function, or set reward.skip_bad=true to leave such responses out."
                    raise InputError(f"{faults[0]} {mend}")
            values.append(value)
        if faults:
            log.warning("%s %d of %d responses are left out.", faults[0], len(faults), len(rows))
        return values

    def _ask(self, row: Judged) -> tuple[float, str | None]:
        """The value, and why there is none (then NaN)."""
        if self._process is None:
            self._start()
        reply = self._exchange({k: v for k, v in row._asdict().items() if k != "id"}, self._limit)
        if reply is None:
            self.stop()
            return math.nan, f"it did not return within reward.limit={self._limit:g} s"
        if "fault" in reply:
            return math.nan, reply["fault"]
        value = reply["value"]
        if not math.isfinite(value):
            return math.nan, f"it returned {value}, expected a finite number"
        return value, None

    def _start(self) -> None:
        module, _, function = self._name.partition(":")
        command = [sys.executable, "-P", str(Path(__file__).with_name("reward_worker.py")), module, function]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=os.getcwd()
        )
        reply = self._exchange(None, START_LIMIT)
        if reply is None or "fault" in reply:
            self.stop()
            why = f"importing it took more than {START_LIMIT:g} s" if reply is None else reply["fault"]
            raise InputError(
                f"reward.terms.{self._name}: {why}. {_ALONE[0].upper()}{_ALONE[1:]}, importable from here."
            )

    def _exchange(self, message: Any, limit: float) -> dict[str, Any] | None:
        """The reply to a message (None: only the first reply); None where there is none in time."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        received = b""
        with contextlib.suppress(BrokenPipeError), selectors.DefaultSelector() as waiting:
            if message is not None:
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
            waiting.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not waiting.select(limit):
                    return None
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    break
                received += part
        if not received.endswith(b"\n"):
            self.stop()
            return {"fault": "its process ended"}
        return json.loads(received)

    def stop(self) -> None:
        if self._process is not None:
            # with all that the function started, which may hold the pipe open
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
