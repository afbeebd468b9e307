"""Degenerate repetition in responses, which are then not to be imitated (cold start, paper C.1)."""

from __future__ import annotations

import re

PHRASE = 200  # words, the longest phrase whose repetition at the end is looked for
LOOP = 24  # words that a loop covers at least, so that 111111 or a table of zeros is none
NGRAM = 20  # words
_WORD = re.compile(r"\w+|[^\w\s]")


def ends_in_a_loop(text: str) -> bool:
    """Whether the text ends in a phrase of 2 … ``PHRASE`` words that stands there at least three times in succession.

    After Holtzman et al. 2020 (The Curious Case of Neural Text Degeneration), who look for a phrase of 3 tokens or more
    standing twice at the end, which sound solutions have, too. A loop of less than ``LOOP`` words is none here. Words
    are runs of letters and digits, and single other signs. The last round may be cut short.
    """
    words = _WORD.findall(text)[-3 * PHRASE :]
    for period in range(2, min(PHRASE, len(words) // 3) + 1):
        same = 0
        while same + period < len(words) and words[-1 - same] == words[-1 - same - period]:
            same += 1
        if same + period >= max(3 * period, LOOP):
            return True
    return False


def repeated_share(text: str) -> float:
    """Share of the words that lie in an n-gram of ``NGRAM`` words that has stood in the text before.

    The duplicate n-gram fraction of Rae et al. 2021 (MassiveText, table A1), which counts characters and has n ≤ 10.
    A longer n leaves room for reasoning, which states its formulas again and again.
    """
    words = _WORD.findall(text)
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(words))
    for i in range(len(words) - NGRAM + 1):
        ngram = tuple(words[i : i + NGRAM])
        if ngram in seen:
            repeated[i : i + NGRAM] = b"\1" * NGRAM
        seen.add(ngram)
    return sum(repeated) / max(len(words), 1)
