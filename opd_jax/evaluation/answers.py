r"""Final answers of responses: find them (last ``\boxed{}``, else ``Answer:``), and compare them with the gold answer.

Integers and equal strings are decided here; the rest goes to ``math-verify`` in worker processes that are killed at a
time limit, because hostile LaTeX hangs sympy (``\boxed{10^{10^{10}}}``). This module imports no JAX.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, Self

Found = Literal["boxed", "answer", "number", "none"]

MAX_LENGTH = 1_000  # characters; a longer answer is right only if it equals the gold text

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"\banswer\b[*_\s]*[:：]", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![\w)\]}])[-−])?\d[\d,]*(?:\.\d+)?")
_INTEGER = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.0*)?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z' ]+")  # four letters: math-verify takes shorter ones for products
_FORM = re.compile(
    r"(?P<row>\\\\)|(?P<frac>\\[dt]frac(?![a-zA-Z]))|(?P<space>\\ |~|\\q?quad(?![a-zA-Z]))"
    r"|\\?\$|\\[,;:!()\[\]]|\\(?:left|right)(?![a-zA-Z])"
)
_FORM_KEPT = {"row": r"\\", "frac": r"\frac", "space": " "}  # all else that _FORM finds is dropped
_UNIT = re.compile(r"(?:\^\{?\\circ\}?|\\degree|°|(?<=\d) dollars?)$")  # math-verify knows the other common units


class Verdict(NamedTuple):
    """What a response was graded as."""

    correct: bool
    answer: str | None  # as it is written there
    found: Found  # in \\boxed{…}, after "Answer:", as the last number, or not at all


def find_answer(text: str, fallback_number: bool = False) -> tuple[str | None, Found]:
    r"""The final answer in a response: last non-empty ``\boxed{…}`` with balanced braces, else what follows the last
    ``Answer:`` on its line (or the next line that is not empty), else None; and which of these it was.

    Args:
        fallback_number: as the last resort take the last number of the text (small models on GSM8K).
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed, "boxed"
    marks = list(_ANSWER.finditer(text))
    if marks:
        lines = text[marks[-1].end() :].lstrip("*_ \t\r\n").splitlines()
        if lines and (answer := lines[0].strip().strip("*`").strip()):
            return answer, "answer"
    if fallback_number and (numbers := _NUMBER.findall(text)):
        return numbers[-1].rstrip(","), "number"
    return None, "none"


def normalise(answer: str) -> str:
    r"""One spelling for answers that differ in form only.

    Away go ``$``, ``\$``, spacing, ``\left``, a trailing degree sign, full stop or ``dollars``, and ``\text{…}`` around
    the whole; ``\dfrac`` becomes ``\frac``; integers lose leading zeros, grouping commas and ``.0``.
    """
    answer = answer.replace("−", "-").replace("{,}", ",")
    answer = _FORM.sub(lambda m: _FORM_KEPT.get(m.lastgroup or "", ""), answer)
    answer = re.sub(r"\s+", " ", answer).strip()
    answer = re.sub(r" (?=\W)|(?<=\W) ", "", answer).rstrip(".")
    answer = _UNIT.sub("", answer)
    while whole := _TEXT.fullmatch(answer) or re.fullmatch(r"\{([^{}]*)\}", answer):
        answer = whole[1].strip()
    number = answer.replace(",", "") if _GROUPED.fullmatch(answer) else answer
    if integer := _INTEGER.fullmatch(number):
        sign = "-" if integer[1] == "-" and integer[2] != "0" else ""
        return sign + integer[2]
    return answer


def quick_verdict(answer: str, gold: str) -> bool | None:
    """Equality of two normalised answers where it needs no algebra: same text, two integers, two words; else None."""
    if answer == gold:
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return False
    if _WORD.fullmatch(answer) and _WORD.fullmatch(gold):
        return answer.casefold() == gold.casefold()
    return False if len(answer) > MAX_LENGTH or not answer else None


class AnswerPool:
    """Grades responses. Workers start when the first answer needs algebra; later pools of this process take them over,
    for they import sympy, which takes seconds.

    Args:
        workers: processes; None: one a core, at most 8.
        limit: CPU seconds for one answer. An answer that needs more counts as wrong.
        fallback_number: see ``find_answer``.
    """

    def __init__(self, workers: int | None = None, limit: float = 1.0, fallback_number: bool = False):
        spare = self._spare = _SPARE.setdefault(limit, [])
        count = workers or min(8, os.cpu_count() or 1)
        self._workers = [spare.pop() if spare else _Worker(limit) for _ in range(count)]
        self._threads = ThreadPoolExecutor(len(self._workers))
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._fallback_number = fallback_number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._spare += self._workers

    def submit(self, text: str, gold: str) -> Future[Verdict]:
        """The verdict on one response, at once if it needs no algebra; the future raises what ``judge`` raises."""
        return self._submit(text, gold, {})

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response text, gold answer) pairs, in their order.

        Raises:
            RuntimeError: ``math-verify`` does not start.
        """
        decided: dict[tuple[str, str], Future[bool]] = {}
        futures = [self._submit(text, gold, decided) for text, gold in pairs]
        return [future.result() for future in futures]

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether each response ends in its gold answer; see ``judge``."""
        return [verdict.correct for verdict in self.judge(pairs)]

    def _submit(self, text: str, gold: str, decided: dict[tuple[str, str], Future[bool]]) -> Future[Verdict]:
        """``decided``: what is being decided already, so that no pair is twice."""
        answer, found = find_answer(text, self._fallback_number)
        result: Future[Verdict] = Future()
        if answer is None:
            result.set_result(Verdict(False, None, found))
            return result
        if r"\boxed" in gold:  # a whole solution stands in the answer column
            gold = find_answer(gold)[0] or gold
        key = normalise(answer), normalise(gold)
        quick = quick_verdict(*key)
        if quick is not None:
            result.set_result(Verdict(quick, answer, found))
            return result
        if key not in decided:
            decided[key] = self._threads.submit(self._decide, key)

        def settle(decision: Future[bool]) -> None:
            if decision.cancelled():
                result.cancel()
            elif error := decision.exception():
                result.set_exception(error)
            else:
                result.set_result(Verdict(decision.result(), answer, found))

        decided[key].add_done_callback(settle)
        return result

    def _decide(self, key: tuple[str, str]) -> bool:
        worker = self._idle.get()
        try:
            return worker.decide(*key)
        finally:
            self._idle.put(worker)


def verify(text: str, gold: str) -> bool:
    """Whether one response ends in the gold answer. For many responses use ``AnswerPool.grade``."""
    return _shared_pool().grade([(text, gold)])[0]


@functools.cache
def _shared_pool() -> AnswerPool:
    return AnswerPool(workers=1)


class _Worker:
    """One ``verifier.py`` process, started when first needed and again if it dies; it ends with ours."""

    def __init__(self, limit: float):
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None

    def decide(self, answer: str, gold: str) -> bool:
        if self._process is not None and self._process.poll() is not None:  # it died while nobody asked
            self.stop()
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply:  # killed from outside, e.g. by the kernel for memory
            self.stop()
        return reply == b"1\n"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the directory of the script is not searched for imports. An own session: Ctrl-C is ours to handle.
        command = [sys.executable, "-P", str(Path(__file__).with_name("verifier.py")), str(self._limit)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            process.kill()
            process.communicate()
            raise RuntimeError(f"the answer verifier did not start; its error stands above ({' '.join(command)})")
        return process


_SPARE: dict[float, list[_Worker]] = {}  # of pools that are done, by limit


def _last_boxed(text: str) -> str | None:
    opened: list[int | None] = []  # for every open brace where its content starts, if it is a box
    best_start, best = -1, None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token.endswith("{") and token != r"\{":
            opened.append(match.end())
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None and start > best_start and text[start : match.start()].strip():
                best_start, best = start, text[start : match.start()].strip()
    return best
