"""Batches: alignment by hand, epochs complete and reshuffled, resume exact through JSON."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_jax.config import Data
from opd_jax.data.pipeline import (
    Example,
    Overlong,
    Share,
    encode_examples,
    encode_prompts,
    prompt_batches,
    sft_batches,
    shares,
    stack_prompts,
)
from opd_jax.data.sources import Record
from opd_jax.errors import InputError

DATA = Data(source="test", chat=False, max_prompt=4)


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *"abcdefgh"])}, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def order(batches, n):
    return [i for batch in itertools.islice(batches, n) for i in batch.ids.tolist()]


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    records = [Record("0", "a b"), Record("1", "a b c d e"), Record("2", "a b c d")]
    encoded, kept, dropped = encode_prompts(records, tokenizer, DATA)
    assert encoded == [[1, 2], [1, 2, 3, 4]]
    assert [r.id for r in kept] == ["0", "2"]
    assert dropped == (1, 0)
    assert dropped.note() == " (1 too long, dropped)"
    with pytest.raises(InputError, match=r"all 1 prompts are longer than data\.max_prompt=4.*shortest has 5"):
        encode_prompts(records[1:2], tokenizer, DATA)


def test_overlong_prompts_are_cut_at_the_left_if_asked(tokenizer):
    records = [Record("0", "a b"), Record("1", "a b c d e f"), Record("2", "a b c d")]
    data = Data(source="test", chat=False, max_prompt=4, overlong="truncate")
    encoded, kept, counts = encode_prompts(records, tokenizer, data)
    assert encoded == [[1, 2], [3, 4, 5, 6], [1, 2, 3, 4]]
    assert kept == records
    assert counts == Overlong(dropped=0, truncated=1)
    assert encode_prompts(records[1:2], tokenizer, data)[0] == [[3, 4, 5, 6]]


def test_notes_tell_dropped_from_truncated():
    assert Overlong(0, 0).note() == ""
    assert Overlong(0, 1200).note() == " (1,200 prompts too long, cut at the left)"
    assert Overlong(3, 2).note() == " (3 too long, dropped; 2 prompts too long, cut at the left)"


def test_stacked_prompts_are_right_aligned_and_repeated():
    prompts = stack_prompts([[5], [6, 7, 8], [9, 9]], [2, 1], 4, samples=2)
    assert prompts.tokens.tolist() == [[0, 0, 9, 9]] * 2 + [[0, 6, 7, 8]] * 2
    assert prompts.lengths.tolist() == [2, 2, 3, 3]
    assert prompts.ids.tolist() == [2, 2, 1, 1]
    assert prompts.samples.tolist() == [0, 1, 0, 1]
    dtypes = [a.dtype.name for a in (prompts.tokens, prompts.lengths, prompts.ids, prompts.samples)]
    assert dtypes == ["int32", "int32", "uint32", "uint32"]


def test_a_prompt_twice_in_a_batch_draws_new_samples():
    prompts = stack_prompts([[5]], [0, 0, 0], 1, samples=2)
    assert prompts.samples.tolist() == [0, 1, 2, 3, 4, 5]
    batch = next(prompt_batches([[1], [2]], batch=5, seed=0, max_prompt=1))
    assert len(set(zip(batch.ids.tolist(), batch.samples.tolist(), strict=True))) == 5


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (12, 4), (3, 8), (7, 1)])
def test_every_epoch_serves_every_row_once(rows, batch):
    encoded = [[i] for i in range(rows)]
    batches = prompt_batches(encoded, batch, seed=1, max_prompt=1)
    taken = list(itertools.islice(batches, -(-6 * rows // batch)))
    assert all(b.tokens.shape == (batch, 1) for b in taken)
    assert all(b.tokens[:, 0].tolist() == b.ids.tolist() for b in taken)
    served = np.concatenate([b.ids for b in taken])[: 6 * rows].reshape(6, rows)
    assert (np.sort(served, axis=1) == np.arange(rows)).all()
    assert len({tuple(epoch) for epoch in served.tolist()}) > 1


def test_seeds_give_different_orders():
    encoded = [[i] for i in range(40)]
    first = [order(prompt_batches(encoded, 8, seed, 1), 5) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize("stop", range(9))
def test_resume_continues_the_uninterrupted_order(stop):
    encoded = [[i] for i in range(10)]
    whole = order(prompt_batches(encoded, 4, 5, 1, samples=2), 9)
    batches = prompt_batches(encoded, 4, 5, 1, samples=2)
    before = order(batches, stop)
    state = json.loads(json.dumps(batches.get_state()))
    resumed = prompt_batches(encoded, 4, 5, 1, samples=2)
    resumed.set_state(state)
    assert before + order(resumed, 9 - stop) == whole


def test_examples_end_and_overlong_ones_are_counted(tokenizer):
    records = [Record("0", "a b", None, "c"), Record("1", "a", None, "b c d"), Record("2", "a b c d e", None, "f")]
    examples, kept, dropped = encode_examples(records, tokenizer, DATA, max_response=3)
    assert examples == [Example([1, 2], [3, 0])]
    assert [r.id for r in kept] == ["0"]
    assert dropped == (2, 0)
    truncating = DATA.model_copy(update={"overlong": "truncate"})
    examples, kept, dropped = encode_examples(records, tokenizer, truncating, max_response=2)
    assert examples == [Example([1, 2], [3, 0]), Example([2, 3, 4, 5], [6, 0])]
    assert [r.id for r in kept] == ["0", "2"]
    assert dropped == (1, 1)
    with pytest.raises(InputError, match=r"none of 1 rows has a prompt within data\.max_prompt=4"):
        encode_examples(records[1:2], tokenizer, DATA, max_response=3)
    with pytest.raises(InputError, match=r"record '9' has no response"):
        encode_examples([Record("9", "a")], tokenizer, DATA, max_response=3)


def test_supervised_batches_cover_an_epoch_and_resume():
    examples = [Example([i + 1], [0]) for i in range(6)]
    batches = sft_batches(examples, 2, seed=0)
    firsts = [[e.prompt[0] for e in b] for b in itertools.islice(batches, 3)]
    assert Counter(itertools.chain(*firsts)) == Counter(range(1, 7))
    resumed = sft_batches(examples, 2, seed=0)
    resumed.set_state(batches.get_state())
    assert next(resumed) == next(batches)


# grain's shuffle takes milliseconds a row where there are a few rows only
PARTS = [
    Share("a", range(100), 0.5),
    Share("b", [*range(100, 130), *range(190, 200)], 0.2),
    Share("c", range(130, 190), 0.3),
]


def mixture(batch=40):
    return prompt_batches([[i] for i in range(200)], batch, 3, 1, parts=PARTS)


def test_mixture_serves_each_source_its_share_and_every_epoch_of_it_whole():
    served = order(mixture(), 50)
    for part in PARTS:
        mine = [i for i in served if i in part.rows]
        share = 0
        for n, i in enumerate(served, start=1):
            share += i in part.rows
            assert abs(share - n * part.weight) < 2 + n / 100  # grain rounds weights to 1 %
        whole = len(mine) // len(part.rows)
        epochs = [tuple(mine[e * len(part.rows) :][: len(part.rows)]) for e in range(whole)]
        assert whole >= 10
        assert all(sorted(epoch) == sorted(part.rows) for epoch in epochs)
        assert len(set(epochs)) > 1


def test_epochs_of_each_source_are_counted_and_survive_a_resume():
    batches = mixture()
    served = order(batches, 9)
    expected = {part.name: sum(i in part.rows for i in served) / len(part.rows) for part in PARTS}
    assert batches.epochs() == expected
    resumed = mixture()
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    assert resumed.epochs() == expected
    assert order(resumed, 3) == order(batches, 3)
    assert resumed.epochs() == batches.epochs() != expected
    assert prompt_batches([[1]] * 4, 2, 0, 1).epochs() == {"": 0}


@pytest.mark.parametrize("batch", [7, 40])
def test_a_mixture_resumes_at_any_step(batch):
    """Thirty-nine kill points, up to eight epochs of every source: the next batches, and the position after them."""
    batches, whole, states = mixture(batch), [], []
    for _ in range(41):
        states.append(json.dumps(batches.get_state()))
        whole += order(batches, 1)
    for stop in range(39):
        resumed = mixture(batch)
        resumed.set_state(json.loads(states[stop]))
        assert order(resumed, 2) == whole[stop * batch : (stop + 2) * batch]
        assert json.dumps(resumed.get_state()) == states[stop + 2]


def test_two_sources_of_one_length_are_shuffled_apart():
    parts = [Share("a", range(50), 1.0), Share("b", range(50, 100), 1.0)]
    served = order(prompt_batches([[i] for i in range(100)], 10, 0, 1, parts=parts), 10)
    first, second = ([i % 50 for i in served if i // 50 == p] for p in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_each_part_has_its_own_template_and_its_rows_are_known(tokenizer):
    mix = {"x": {"source": "x.jsonl", "weight": 3}, "y": {"source": "y.jsonl", "template": "{problem} h"}}
    data = Data.model_validate({"mix": mix, "chat": False, "max_prompt": 3, "template": "g {problem}"})
    records = [Record("x/0", "a b", source="x"), Record("y/0", "a b c", source="y"), Record("y/1", "b", source="y")]
    encoded, kept, dropped = encode_prompts(records, tokenizer, data)
    assert encoded == [[7, 1, 2], [2, 8]]
    assert dropped == Overlong(1, 0)
    assert shares(kept, data) == [("x", [0], 3.0), ("y", [1], 1.0)]
    with pytest.raises(InputError, match=r"data\.mix\.x: none of its rows fits"):
        shares(kept[1:], data)
    assert shares(kept, DATA) == [("", range(2), 1.0)]


def test_supervised_mixture():
    batches = sft_batches([Example([i], [0]) for i in range(200)], 40, 3, PARTS)
    assert [e.prompt[0] for batch in itertools.islice(batches, 3) for e in batch] == order(mixture(), 3)
