"""Duplicates of problems within a set, and problems that stand in other sets (contamination)."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opd_jax.data.sources import Record
from opd_jax.data.templates import strip_instruction
from opd_jax.errors import InputError

Placed = tuple[str, Record]  # where it stands, what it is
Embed = Callable[[list[str]], np.ndarray]  # texts → [rows, size], each of length 1

CHUNK = 1024  # rows whose similarities are held at the same time

# \left, \displaystyle, \text and spacing change how a formula looks, not what it says
_LOOKS = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|(?:display|text)style|q?quad|limits|text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)(?![a-zA-Z])"
    r"|\\[,;:!> ()\[\]]|\{,\}|(?<=\d),(?=\d{3}(?!\d))"
)
_SAME = ((re.compile(r"\\[dt]frac"), r"\\frac"), (re.compile(r"\\([lgn])e(?![a-zA-Z])"), r"\\\1eq"))
# Kept are operators (z⁴ + z² or z⁴ − z²), brackets (88 ÷ (4 ÷ 2)) and the decimal point (tan 22.5°).
_DROPPED = re.compile(r"(?:[^\w+\-=<>*/^!|().]|_|(?<!\d)\.|\.(?!\d))+")

_VARIABLE = re.compile(r"^[a-z]=")  # the answer x = 4 is 4


@dataclass(frozen=True)
class Duplicate:
    """A problem that is to go, and the one that it repeats.

    reason: ``exact`` same text; ``letters and digits`` same but for operators and punctuation; ``near`` similar
    sentence embeddings; ``conflicting answers`` the same problem stands there with another answer.
    """

    index: int
    reason: str
    of: Placed
    similarity: float | None = None


def normalise(problem: str) -> str:
    """One spelling of a problem: no instruction, case, white space, LaTeX spacing and fonts, punctuation."""
    text = unicodedata.normalize("NFKC", strip_instruction(problem)).replace("−", "-")
    text = _LOOKS.sub("", text)
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return _DROPPED.sub("", text.casefold())


def find_duplicates(
    rows: Sequence[Placed], against: Sequence[Placed] = (), embed: Embed | None = None, similarity: float = 0.6
) -> list[Duplicate]:
    """What to drop of ``rows``, in their order: what stands in ``against``, then what stands in ``rows`` twice.

    Against other sets texts are compared by letters and digits alone, for a problem of a benchmark with another sign
    is not one to train on; within the set operators and brackets count. Of equal problems the first is kept; where
    their answers differ, none is: one of them is wrong. With ``embed`` what is left is compared by cosine similarity
    with ``against``, or, where there is none, with the rows before it (paper, C.3: at least 0.6).
    """
    keys = [normalise(record.problem) for _, record in rows]
    found = _exact_against(keys, against)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        if i not in found:
            groups[key].append(i)
    for first, *others in groups.values():
        answers = {_VARIABLE.sub("", normalise(rows[i][1].answer or "")) for i in (first, *others)}
        for i in others:
            found[i] = Duplicate(i, "exact" if len(answers) == 1 else "conflicting answers", rows[first])
        if len(answers) > 1:
            found[first] = Duplicate(first, "conflicting answers", rows[others[0]])
    if embed:
        left = [i for i in range(len(rows)) if i not in found]
        found |= {near.index: near for near in _near(rows, left, against, embed, similarity)}
    return [found[i] for i in sorted(found)]


def load_embedder(model: str) -> Embed:
    """A sentence-transformers model: a directory, or a name on the Hugging Face Hub.

    Raises:
        InputError: the package is not installed, or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise InputError(
            f"--near {model}: sentence embeddings need pip install 'opd-jax[near]' ({e}). Without --near only equal "
            "texts are found."
        ) from e
    try:
        encoder = SentenceTransformer(model, trust_remote_code=False)
    except Exception as e:  # network, hub and file errors share no base class
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise InputError(
            f"--near {model}: cannot load it ({reason}). Give a directory or a name on the Hub, such as "
            "sentence-transformers/all-MiniLM-L6-v2."
        ) from e
    return lambda texts: np.asarray(encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False))


def _exact_against(keys: Sequence[str], against: Sequence[Placed]) -> dict[int, Duplicate]:
    exact: dict[str, Placed] = {}
    loose: dict[str, Placed] = {}
    for placed in against:
        key = normalise(placed[1].problem)
        exact.setdefault(key, placed)
        loose.setdefault(_letters_and_digits(key), placed)
    found = {}
    for i, key in enumerate(keys):
        if key in exact:
            found[i] = Duplicate(i, "exact", exact[key])
        elif (short := _letters_and_digits(key)) in loose:
            found[i] = Duplicate(i, "letters and digits", loose[short])
    return found


def _letters_and_digits(key: str) -> str:
    # a text of symbols alone stays as it is
    return re.sub(r"\W+", "", key) or key


def _near(
    rows: Sequence[Placed], left: Sequence[int], against: Sequence[Placed], embed: Embed, similarity: float
) -> Iterator[Duplicate]:
    if not left:
        return
    ours = embed([strip_instruction(rows[i][1].problem) for i in left])
    theirs = embed([strip_instruction(record.problem) for _, record in against]) if against else ours
    gone = np.zeros(len(theirs), bool)
    for start in range(0, len(left), CHUNK):
        cosines = ours[start : start + CHUNK] @ theirs.T
        for i, row in enumerate(cosines, start=start):
            if not against:
                row = np.where(gone[:i], -1.0, row[:i])
            if len(row) and row[best := int(row.argmax())] >= similarity:
                of = against[best] if against else rows[left[best]]
                yield Duplicate(left[i], "near", of, float(row[best]))
                if not against:
                    gone[i] = True
