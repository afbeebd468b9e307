"""From records to batches of token ids: encoding with counts of what did not fit, then endless shuffled iterators.

The iterators are grain's: ``get_state()`` is a small JSON-able dict, ``set_state(state)`` continues with exactly the
batch that would have come next. Each epoch has its own order. Batches run on across the end of an epoch, so every
epoch serves every row exactly once whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from opd_jax import config
from opd_jax.data.sources import Record
from opd_jax.data.templates import encode_prompt
from opd_jax.errors import InputError
from opd_jax.types import Prompts

Tokens = list[int]


class Example(NamedTuple):
    """One row of supervised data; the response ends with the end-of-sequence id."""

    prompt: Tokens
    response: Tokens


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
    encoded = [_encode(record, tokenizer, data) for record in records]
    fitting = [i for i, tokens in enumerate(encoded) if len(tokens) <= data.max_prompt]
    too_long = len(records) - len(fitting)
    if data.overlong == "truncate":
        return [tokens[-data.max_prompt :] for tokens in encoded], records, Overlong(0, too_long)
    if not fitting:
        shortest = min(map(len, encoded))
        raise InputError(
            f"{data.source}: all {len(records)} prompts are longer than data.max_prompt={data.max_prompt} tokens; "
            f"the shortest has {shortest}. Raise data.max_prompt, or set data.overlong=truncate."
        )
    return [encoded[i] for i in fitting], [records[i] for i in fitting], Overlong(too_long, 0)


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
    examples, kept, truncated = [], [], 0
    for record in records:
        if record.response is None:
            raise InputError(f"{data.source}: record {record.id!r} has no response. Set data.response=COLUMN.")
        response = [*tokenizer.encode(record.response, add_special_tokens=False), tokenizer.eos_token_id]
        prompt = _encode(record, tokenizer, data)
        too_long = len(prompt) > data.max_prompt
        if len(response) <= max_response and not (too_long and data.overlong == "drop"):
            examples.append(Example(prompt[-data.max_prompt :], response))
            kept.append(record)
            truncated += too_long
    if not kept:
        raise InputError(
            f"{data.source}: none of {len(records)} rows has a prompt within data.max_prompt={data.max_prompt} and a "
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


def prompt_batches(
    encoded: Sequence[Tokens], batch: int, seed: int, max_prompt: int, samples: int = 1
) -> grain.DatasetIterator[Prompts]:
    """Endless ``Prompts`` of ``batch`` prompts × ``samples`` rows, see ``stack_prompts``."""
    return _endless(len(encoded), batch, seed, lambda ids: stack_prompts(encoded, ids, max_prompt, samples))


def sft_batches(examples: Sequence[Example], batch: int, seed: int) -> grain.DatasetIterator[list[Example]]:
    """Endless batches of supervised examples."""
    return _endless(len(examples), batch, seed, lambda ids: [examples[i] for i in ids])


def _endless(rows: int, batch: int, seed: int, stack: Callable[[Sequence[int]], Any]) -> grain.DatasetIterator[Any]:
    rows_in_order = grain.MapDataset.range(rows).seed(seed).shuffle().repeat()
    # drop_remainder: the endless dataset has none, but rounding its length up overflows at batch 1.
    batches = rows_in_order.batch(batch, drop_remainder=True, batch_fn=stack)
    # No read-ahead threads: stacking takes microseconds, and threads would outlive the run.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _encode(record: Record, tokenizer: Any, data: config.Data) -> Tokens:
    return encode_prompt(tokenizer, record.problem, data.template, data.chat, data.chat_arguments)
