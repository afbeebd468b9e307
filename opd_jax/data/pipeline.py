"""From records to batches of token ids: encoding with counts of what did not fit, then endless shuffled batches.

Each source is shuffled by itself, in another order every epoch; a mixture takes from them by weight, evenly: of any n
rows in succession, each source has its share to within a row or two (and 1 %: grain rounds the weights). Batches run
on across the end of an epoch, so every epoch of a source serves every row of it exactly once, whatever the batch size.
Every process makes the same batches, and takes its own rows of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import grain
import numpy as np

from opd_jax import config
from opd_jax.data.sources import Record
from opd_jax.data.templates import encode_prompt
from opd_jax.errors import InputError
from opd_jax.types import Prompts

Tokens = list[int]
T = TypeVar("T")


class Example(NamedTuple):
    """One row of supervised data; the response ends with the end-of-sequence id."""

    prompt: Tokens
    response: Tokens


class Share(NamedTuple):
    """The rows of one source, and how many of the rows served they are to be, relative to the other sources."""

    name: str
    rows: Sequence[int]
    weight: float


class Overlong(NamedTuple):
    """How many rows were left out because they were too long, and how many prompts lost their first tokens."""

    dropped: int
    truncated: int

    def note(self) -> str:
        """In brackets, to follow the number of rows; nothing where all fitted."""
        parts = [f"{self.dropped:,} too long, dropped"] if self.dropped else []
        parts += [f"{self.truncated:,} prompts too long, cut at the left"] if self.truncated else []
        return f" ({'; '.join(parts)})" if parts else ""


def encode_prompts(
    records: list[Record], tokenizer: Any, data: config.Data
) -> tuple[list[Tokens], list[Record], Overlong]:
    """Token ids of at most ``data.max_prompt`` of every prompt kept, their records (same order), counts of the others.

    ``data.overlong`` drop leaves longer prompts out; truncate keeps their last ``data.max_prompt`` tokens, and so all.

    Raises:
        InputError: every prompt is too long and would be dropped; what ``encode_prompt`` refuses.
    """
    encode = _encoder(tokenizer, data)
    encoded = [encode(record) for record in records]
    fitting = [i for i, tokens in enumerate(encoded) if len(tokens) <= data.max_prompt]
    too_long = len(records) - len(fitting)
    if data.overlong == "truncate":
        return [tokens[-data.max_prompt :] for tokens in encoded], records, Overlong(0, too_long)
    if not fitting:
        shortest = min(map(len, encoded))
        raise InputError(
            f"{data.title}: all {len(records)} prompts are longer than data.max_prompt={data.max_prompt} tokens; "
            f"the shortest has {shortest}. Raise data.max_prompt, or set data.overlong=truncate."
        )
    return [encoded[i] for i in fitting], [records[i] for i in fitting], Overlong(too_long, 0)


def encode_context(record: Record, tokenizer: Any, data: config.Data, context: str | None) -> Tokens:
    """The prompt of a teacher that knows more: ``context`` holds {problem} and {answer} or {response}; None: the
    student's own.

    Raises:
        InputError: the record lacks what the context holds.
    """
    if context is None:
        return _encoder(tokenizer, data)(record)[-data.max_prompt :]

    def value(match: re.Match[str]) -> str:
        found = getattr(record, match[1])
        if found is None:
            raise InputError(
                f"{data.title}: record {record.id!r} has no {match[1]}, which teacher.context holds. Name its column "
                f"with data.{match[1]}=COLUMN, or fill it."
            )
        return found

    text = re.sub(r"\{(problem|answer|response)\}", value, context)
    return encode_prompt(tokenizer, text, "plain", data.chat, data.chat_arguments)


def encode_examples(
    records: list[Record], tokenizer: Any, data: config.Data, max_response: int
) -> tuple[list[Example], list[Record], Overlong]:
    """Prompt and response + end-of-sequence of every row that fits, the records kept, counts of the others.

    Prompts are treated as by ``encode_prompts``; a row with too long a response is always dropped.

    Raises:
        InputError: a record without response; a tokenizer without end-of-sequence; no row fits.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so responses could not be taught to end.")
    encode = _encoder(tokenizer, data)
    examples, kept, truncated = [], [], 0
    for record in records:
        if record.response is None:
            raise InputError(f"{data.title}: record {record.id!r} has no response. Set data.response=COLUMN.")
        response = [*tokenizer.encode(record.response, add_special_tokens=False), tokenizer.eos_token_id]
        prompt = encode(record)
        too_long = len(prompt) > data.max_prompt
        if len(response) <= max_response and not (too_long and data.overlong == "drop"):
            examples.append(Example(prompt[-data.max_prompt :], response))
            kept.append(record)
            truncated += too_long
    if not kept:
        raise InputError(
            f"{data.title}: none of {len(records)} rows has a prompt within data.max_prompt={data.max_prompt} and a "
            f"response within max_response={max_response} tokens. Raise these limits."
        )
    return examples, kept, Overlong(len(records) - len(kept), truncated)


def stack_prompts(encoded: Sequence[Tokens], ids: Sequence[int], max_prompt: int, samples: int = 1) -> Prompts:
    """``Prompts`` of the rows ``encoded[i] for i in ids``, each ``samples`` times in succession, as NumPy arrays.

    ``ids`` of the result index ``encoded``, and so the list of kept records. ``samples`` counts 0 … samples−1; a prompt
    that stands in ``ids`` twice counts on, since (id, sample) seeds its random numbers.
    """
    seen: dict[int, int] = {}
    tokens_BP = np.zeros((len(ids) * samples, max_prompt), np.int32)
    sample_B = np.empty(len(ids) * samples, np.uint32)
    for row, i in enumerate(ids):
        rows = slice(row * samples, (row + 1) * samples)
        tokens_BP[rows, max_prompt - len(encoded[i]) :] = encoded[i]
        first = seen.get(i, 0)
        sample_B[rows] = np.arange(first, first + samples)
        seen[i] = first + samples
    lengths = np.array([len(encoded[i]) for i in ids], np.int32)
    arrays: dict[str, Any] = {"tokens": tokens_BP, "samples": sample_B}
    arrays |= {"lengths": np.repeat(lengths, samples), "ids": np.repeat(np.array(ids, np.uint32), samples)}
    return Prompts(**arrays)


def shares(records: Sequence[Record], data: config.Data) -> list[Share]:
    """What each source of ``data`` contributes to the batches; ``records`` are those that were kept.

    Raises:
        InputError: a part of the mixture of which nothing was kept.
    """
    if not data.mix:
        return [Share("", range(len(records)), 1.0)]
    rows: dict[str, list[int]] = {name: [] for name in data.mix}
    for i, record in enumerate(records):
        rows[record.source].append(i)
    for name, kept in rows.items():
        if not kept:
            raise InputError(
                f"data.mix.{name}: none of its rows fits. Raise data.max_prompt={data.max_prompt}, set "
                "data.overlong=truncate, or remove it."
            )
    return [Share(name, kept, data.mix[name].weight) for name, kept in rows.items()]


class Batches(Iterator[T], Generic[T]):
    """Endless batches of ``batch`` rows from ``parts``, made by ``stack`` from the indices of the rows.

    ``get_state()`` is a small JSON-able dict; ``set_state(state)`` continues with exactly the batch that would have
    come next.
    """

    def __init__(self, parts: Sequence[Share], batch: int, seed: int, stack: Callable[[Sequence[int]], T]):
        self._parts, self._stack = parts, stack
        self._part_of = {i: p for p, part in enumerate(parts) for i in part.rows}
        self._served = [0] * len(parts)
        orders = [grain.MapDataset.source(part.rows).seed(seed + p).shuffle().repeat() for p, part in enumerate(parts)]
        mixed = grain.MapDataset.mix(orders, [part.weight for part in parts]) if len(parts) > 1 else orders[0]
        # drop_remainder: the endless dataset has none, but rounding its length up overflows at batch 1.
        batches = mixed.batch(batch, drop_remainder=True, batch_fn=list)
        # No look-ahead: stacking takes milliseconds, and threads would outlive the run.
        self._rows = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        rows: list[int] = next(self._rows)
        for i in rows:
            self._served[self._part_of[i]] += 1
        return self._stack(rows)

    def epochs(self) -> dict[str, float]:
        """How often each source has been served so far; the name of a single source is empty."""
        return {part.name: n / len(part.rows) for part, n in zip(self._parts, self._served, strict=True)}

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._rows.get_state(), "served": list(self._served)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._rows.set_state(state["rows"])
        self._served = list(state["served"])


def prompt_batches(
    encoded: Sequence[Tokens],
    batch: int,
    seed: int,
    max_prompt: int,
    samples: int = 1,
    parts: Sequence[Share] | None = None,
) -> Batches[Prompts]:
    """Endless ``Prompts`` of ``batch`` prompts × ``samples`` rows, see ``stack_prompts``; ``parts`` as from ``shares``,
    None: one source."""
    parts = parts or [Share("", range(len(encoded)), 1.0)]
    return Batches(parts, batch, seed, lambda ids: stack_prompts(encoded, ids, max_prompt, samples))


def sft_batches(
    examples: Sequence[Example], batch: int, seed: int, parts: Sequence[Share] | None = None
) -> Batches[list[Example]]:
    """Endless batches of supervised examples; ``parts`` as in ``prompt_batches``."""
    parts = parts or [Share("", range(len(examples)), 1.0)]
    return Batches(parts, batch, seed, lambda ids: [examples[i] for i in ids])


class Mixed:
    """Batches of prompts to sample from (None where nothing is) and of texts that are not sampled."""

    def __init__(self, prompts: Batches[Prompts] | None, texts: Batches[list[Example]]):
        self._both = {"prompts": prompts, "texts": texts}

    def __next__(self) -> tuple[Prompts | None, list[Example]]:
        prompts, texts = (part and next(part) for part in self._both.values())
        return prompts, texts  # pyright: ignore[reportReturnType]

    def epochs(self) -> dict[str, float]:
        found = {name: part.epochs() for name, part in self._both.items() if part}
        return {f"{name}/{part}".rstrip("/"): n for name, epochs in found.items() for part, n in epochs.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: part.get_state() for name, part in self._both.items() if part}

    def set_state(self, state: dict[str, Any]) -> None:
        for name, part in self._both.items():
            if part:
                part.set_state(state[name])


def _encoder(tokenizer: Any, data: config.Data) -> Callable[[Record], Tokens]:
    parts = data.parts
    return lambda record: encode_prompt(
        tokenizer, record.problem, parts[record.source].template, data.chat, data.chat_arguments
    )
