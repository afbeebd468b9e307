"""Rollouts against teacher forcing, a greedy loop without cache, and themselves in other batches and on meshes."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling_law import brute_force
from tiny_runs import by_response, response_mask

from opd_jax.errors import InputError
from opd_jax.mesh import ROLLOUT, Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig, forward, head, init_params, parameter_shardings, unembed
from opd_jax.sampling.decode import SEGMENT, bucket, make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import pack
from opd_jax.sampling.scheduler import Occupancy, Request, generate, make_rollout
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Params, Prompts, Rollouts, Sequences

VOCAB, PADDED = 60, 64  # the head has four ids that no tokenizer knows
PROMPT, RESPONSE, ROWS = 9, 14, 8
STOPS, TOP = (3, 17), 5
PLAIN, CUT = Law(1.0, 1.0, 0), Law(0.8, 0.9, 12)


@functools.cache
def model(window: int | None = None) -> tuple[Params, DecoderConfig]:
    """Weights large enough that context matters; one of two unknown ids always has the largest logit."""
    config = DecoderConfig(
        "llama", PADDED, width=32, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-6,
        rope_theta=1e4, max_positions=64, windows=None if window is None else (None, window),
    )  # fmt: skip
    params = jax.tree.map(lambda w: 2 * w, init_params(config, jax.random.key(1)))
    params["head"] = 5 * params["head"]
    params["head"] = params["head"].at[VOCAB].mul(40).at[VOCAB + 1].set(-40 * params["head"][VOCAB])
    return params, config


def prompt_rows(width: int = PROMPT, rows: Any = range(ROWS)) -> Prompts:
    """Ragged prompts with id 0, which also fills the padding, among their tokens; two samples of each."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, PROMPT + 1, ROWS)
    texts = [rng.integers(0, VOCAB, n) * (rng.random(n) > 0.3) for n in lengths]
    tokens = np.zeros((ROWS, width), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[width - len(text) :] = text
    rows = np.asarray(rows)
    ids, samples = rows // 2 + 10, rows % 2
    arrays = (tokens[rows], lengths[rows].astype(np.int32), ids.astype(np.uint32), samples.astype(np.uint32))
    return Prompts(*map(jnp.asarray, arrays))


@functools.cache
def rollout_of(window: int | None = None, layout: Layout | None = None, slots: int | None = None) -> Any:
    engine = make_engine(model(window)[1], stop_ids=STOPS, vocab_size=VOCAB, support=TOP, layout=layout)
    sample = make_rollout(engine, max_response=RESPONSE, slots=slots)
    return lambda params, *rest: sample(engine.cast(params), *rest)


def sample(law: Law = PLAIN, window: int | None = None, step: int = 7) -> Rollouts:
    return jax.device_get(rollout_of(window)(model(window)[0], prompt_rows(), law, 0, step))


@functools.partial(jax.jit, static_argnums=1)
def forced(params: Params, config: DecoderConfig, rows: Sequences) -> Any:
    return unembed(hidden_states(params, config, rows), head(params))


def teacher_forced(params: Params, config: DecoderConfig, rollouts: Rollouts) -> np.ndarray:
    rows = pack(rollouts)
    return np.where(np.arange(PADDED) < VOCAB, by_response(rows, forced(params, config, rows)), -np.inf)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("law", [PLAIN, CUT], ids=["plain", "cut"])
def test_what_is_returned_equals_a_teacher_forced_rescoring(window: int | None, law: Law) -> None:
    out = sample(law, window)
    logits = np.asarray(teacher_forced(*model(window), out))
    mask = response_mask(out)
    logp = log_softmax(logits)
    at = np.array([brute_force(row, float(law[0]), float(law[1]), int(law[2])) for row in logits[mask]])
    np.testing.assert_allclose(out.logp[mask], np.log(at[np.arange(len(at)), out.tokens[mask]]), rtol=0, atol=1e-4)
    p = np.exp(logp[mask])
    entropy = -(p * np.where(p > 0, logp[mask], 0)).sum(-1)
    np.testing.assert_allclose(out.entropy[mask], entropy, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(out.topk_ids[mask], np.argsort(-logits[mask], axis=-1, kind="stable")[:, :TOP])
    best = np.take_along_axis(logp, np.asarray(out.topk_ids), axis=-1)
    np.testing.assert_allclose(out.topk_logp[mask], best[mask], rtol=1e-5, atol=1e-4)


def test_greedy_equals_the_loop_without_cache() -> None:
    """Left-aligned, one whole forward per token, NumPy argmax."""
    params, config = model(4)
    out, prompts = sample(Law(0.0), 4), prompt_rows()
    next_logits = jax.jit(lambda *a: unembed(forward(params, config, *a), head(params)))
    columns = np.broadcast_to(np.arange(PROMPT + RESPONSE, dtype=np.int32), (ROWS, PROMPT + RESPONSE))
    tokens, ends = np.zeros_like(columns), np.array(prompts.lengths)
    for row, text, n in zip(tokens, np.asarray(prompts.tokens), ends, strict=True):
        row[:n] = text[PROMPT - n :]
    for t in range(RESPONSE):
        logits = np.asarray(next_logits(tokens, columns, (columns < ends[:, None]).astype(np.int32)))
        chosen = logits[np.arange(ROWS), ends - 1, :VOCAB].argmax(-1)
        live = out.lengths > t
        np.testing.assert_array_equal(out.tokens[live, t], chosen[live])
        tokens[np.arange(ROWS), ends] = chosen
        ends += 1
    assert (np.asarray(out.logp) == 0).all()  # the law has all mass on one id


def test_rows_end_with_a_stop_id_and_are_empty_after_it() -> None:
    endings = set()
    for step in range(6):
        out = sample(step=step)
        for row, n, stopped in zip(out.tokens, out.lengths, out.stopped, strict=True):
            hits = np.flatnonzero(np.isin(row[:n], STOPS))
            assert stopped == (hits.size > 0)
            assert hits.tolist() == ([n - 1] if stopped else [])
            assert n == RESPONSE or stopped
            endings |= {int(row[n - 1])} if stopped else {"limit"}
        for name in ("tokens", "logp", "entropy", "topk_ids", "topk_logp"):
            assert not np.asarray(getattr(out, name))[~response_mask(out)].any()
        assert (out.logp[response_mask(out)] < 0).all()
    assert endings == {*STOPS, "limit"}


def test_ids_past_the_tokenizer_never_appear() -> None:
    params, config = model()
    out = sample()
    rows = pack(out)
    logits = by_response(rows, forced(params, config, rows))
    assert (np.argmax(logits, axis=-1)[response_mask(out)] >= VOCAB).mean() > 0.9
    assert out.tokens.max() < VOCAB
    assert out.topk_ids.max() < VOCAB


def test_the_id_that_fills_the_padding_can_be_sampled() -> None:
    """Nothing is inferred from a token's id: after an id 0 the row goes on, with what follows attending to it."""
    params, config = model()
    likely = params | {"head": params["head"].at[0].set(params["head"][:VOCAB].sum(0) / 4)}
    out = jax.device_get(rollout_of()(likely, prompt_rows(), PLAIN, 0, 7))
    inside = (out.tokens == 0) & (np.arange(RESPONSE) < out.lengths[:, None] - 1)
    assert inside.sum() > 5
    logp = log_softmax(np.asarray(teacher_forced(likely, config, out)))
    mask = response_mask(out)
    scored = np.take_along_axis(logp, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logp[mask], scored[mask], rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_a_response_does_not_depend_on_its_batch(window: int | None) -> None:
    """Alone, in a batch of three in another order, and with more padding on the left: the same tokens."""
    params, _ = model(window)
    whole, rollout = sample(window=window), rollout_of(window)
    for width, rows in ((PROMPT, [5]), (PROMPT, [6, 0, 5]), (PROMPT + 6, [5, 6, 0])):
        out = jax.device_get(rollout(params, prompt_rows(width, rows), PLAIN, 0, 7))
        np.testing.assert_array_equal(out.tokens, whole.tokens[rows])
        np.testing.assert_array_equal(out.lengths, whole.lengths[rows])
        np.testing.assert_allclose(out.logp, whole.logp[rows], rtol=0, atol=1e-4)


def test_fewer_slots_than_rows_make_the_same_rollouts() -> None:
    """``rollout.slots``: five rows enter as others end."""
    whole, out = sample(window=4), jax.device_get(rollout_of(4, slots=3)(model(4)[0], prompt_rows(), PLAIN, 0, 7))
    for name in ("tokens", "lengths", "stopped", "topk_ids"):
        np.testing.assert_array_equal(getattr(out, name), getattr(whole, name))
    np.testing.assert_allclose(out.logp, whole.logp, rtol=0, atol=1e-4)


def test_samples_steps_and_seeds_differ() -> None:
    out = sample()
    assert not np.array_equal(out.tokens[0], out.tokens[1])  # two samples of one prompt position by position
    assert not np.array_equal(out.tokens, sample(step=8).tokens)
    other_seed = jax.device_get(rollout_of()(model()[0], prompt_rows(), PLAIN, 1, 7))
    assert not np.array_equal(out.tokens, other_seed.tokens)
    np.testing.assert_array_equal(out.tokens, sample().tokens)


@functools.cache
def engine_of(layout: Layout | None = None) -> Any:
    return make_engine(model(6)[1], stop_ids=STOPS, vocab_size=VOCAB, support=TOP, dtype=jnp.float32, layout=layout)


def requests(n: int = 24, samples: int = 2) -> list[Request]:
    rng = np.random.default_rng(9)
    texts = [rng.integers(0, VOCAB, rng.integers(1, 31)).tolist() for _ in range(n // samples)]
    return [Request(text, 100 + i, s) for i, text in enumerate(texts) for s in range(samples)]


def responses(engine: Any, slots: int, order: Any = None, **options: Any) -> dict:
    """{(id, sample): response} of the requests in the order given; long responses, so that the cache is moved."""
    asked = requests()
    asked = asked if order is None else [asked[i] for i in order]
    settings: dict[str, Any] = {"slots": slots, "max_response": 120} | options
    params = model(6)[0]
    if engine.layout:
        params = jax.device_put(params, parameter_shardings(model(6)[1], Layout(engine.layout.mesh)))
    made = generate(engine, engine.cast(params), asked, Law(1.5), 3, 4, **settings)
    out = {(asked[i].id, asked[i].sample): response for i, response in made}
    assert len(out) == len(asked)
    return out


def same(got: dict, want: dict) -> None:
    """Equal tokens, except in a row from a token on whose uniform lies at an edge of the distribution function."""
    flips = 0
    for key, response in want.items():
        n = min(len(response.tokens), len(got[key].tokens))
        differ = np.flatnonzero(got[key].tokens[:n] != response.tokens[:n])
        stop = int(differ[0]) if differ.size else n
        assert differ.size or len(got[key].tokens) == len(response.tokens)
        flips += differ.size > 0
        np.testing.assert_allclose(got[key].logp[:stop], response.logp[:stop], rtol=0, atol=1e-4)
    assert flips <= 0.001 * sum(len(r.tokens) for r in want.values())


@functools.cache
def by_sixteen() -> dict:
    return responses(engine_of(), 16)


@pytest.mark.exhaustive
@pytest.mark.parametrize("slots", [1, 3])
def test_a_response_does_not_depend_on_slots_order_or_refills(slots: int) -> None:
    want = by_sixteen()
    lengths = [len(r.tokens) for r in want.values()]
    assert max(lengths) > 2 * SEGMENT
    assert min(lengths) < SEGMENT
    occupancy = Occupancy()
    same(responses(engine_of(), slots, np.random.default_rng(slots).permutation(24), occupancy=occupancy), want)
    assert occupancy.busy == sum(lengths)
    assert occupancy.busy_waiting > 0.8 * occupancy.all_waiting


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.exhaustive), (2, 2, 2)], ids=str)
def test_a_response_does_not_depend_on_the_mesh(sizes: tuple[int, int, int]) -> None:
    layout = Layout(make_mesh(*sizes), ROLLOUT)
    same(responses(engine_of(layout), 8), by_sixteen())


@pytest.mark.parametrize("limit", [pytest.param(120, marks=pytest.mark.exhaustive), 33])
def test_refilled_moved_and_narrowed_rows_equal_a_teacher_forced_rescoring(limit: int) -> None:
    params, config = model(6)
    asked = {(r.id, r.sample): r.tokens for r in requests()}
    score = jax.jit(
        lambda *a: jax.nn.log_softmax(unembed(forward(params, config, *a), head(params))[..., :VOCAB] / 1.5)
    )
    for key, response in responses(engine_of(), 4, max_response=limit).items():
        text = np.array([*asked[key], *response.tokens])
        row = np.zeros((1, 160), np.int32)
        row[0, : len(text)] = text
        columns = np.arange(160, dtype=np.int32)[None]
        logp = np.asarray(score(row, columns, (columns < len(text)).astype(np.int32)))[0]
        at = np.arange(len(asked[key]), len(text))
        np.testing.assert_allclose(response.logp, logp[at - 1, text[at]], rtol=0, atol=1e-4)


@pytest.mark.exhaustive
def test_shapes_compile_once_and_another_law_seed_or_step_nothing() -> None:
    """200 prompts of 5 to 500 tokens; no end-of-sequence, so that every law meets the same shapes."""
    engine = make_engine(model(6)[1], stop_ids=(), vocab_size=VOCAB, support=1, dtype=jnp.float32, layout=None)
    weights, lengths = engine.cast(model(6)[0]), np.random.default_rng(1).integers(5, 501, 200)
    asked = [Request([5] * int(n), i, 0) for i, n in enumerate(lengths)]

    def compiled(law: Law, seed: int, step: int) -> list[int]:
        made = generate(engine, weights, asked, law, seed, step, slots=16, max_response=20)
        assert len(list(made)) == 200
        return [f._cache_size() for f in (engine.prefill, engine.segment)]

    first = compiled(PLAIN, 0, 0)
    widths, sizes = {bucket(int(n), 16) for n in lengths}, {1, 4, 16}
    assert first[0] <= len(widths) * len(sizes)
    assert first[1] <= 4
    for law, seed, step in ((CUT, 0, 1), (Law(0.0), 2**31 - 1, 2), (Law(0.3, 0.5), 3, 2**31 - 1)):
        assert compiled(law, seed, step) == first


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), (1, 1, 2), pytest.param((1, 8, 1), marks=pytest.mark.exhaustive)], ids=str
)
def test_the_same_tokens_on_a_mesh(sizes: tuple[int, int, int]) -> None:
    """Weights arrive sharded as in training; the decode loop moves nothing as large as a weight between devices, and
    gathers no logits. The rows of (1, 1, 2) do not divide over its devices."""
    params, config = model(4)
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    train, layout = Layout(mesh), Layout(mesh, ROLLOUT)
    params = jax.device_put(params, parameter_shardings(config, train))
    rollout, want = rollout_of(4, layout=layout), sample(window=4)
    rows = len(prompt_rows().lengths) - (sizes == (1, 1, 2))
    want = jax.tree.map(lambda x: x[:rows], want)
    out = rollout(params, jax.tree.map(lambda x: x[:rows], prompt_rows()), PLAIN, 0, 7)
    np.testing.assert_array_equal(out.tokens, want.tokens)
    np.testing.assert_array_equal(out.topk_ids, want.topk_ids)
    np.testing.assert_allclose(out.logp, want.logp, rtol=0, atol=1e-4)
    engine = make_engine(config, stop_ids=STOPS, vocab_size=VOCAB, support=TOP, dtype=jnp.float32, layout=layout)
    weights = engine.cast(params)
    slots = max(4, mesh.shape["data"] * mesh.shape["fsdp"])
    program = engine.segment.lower(weights, engine.empty(slots, 32), PLAIN, 14, 14, 9).compile().as_text()
    smallest_weight = config.width * config.kv_heads * config.head_dim // mesh.shape["tensor"]
    sizes_moved = collective_sizes_in_loops(program)
    assert max(sizes_moved, default=0) < smallest_weight
    assert not re.search(rf"\[\d+,{PADDED}\]\S* all-gather", program)


def test_bad_requests_are_named() -> None:
    engine = engine_of()
    with pytest.raises(InputError, match="prompt 7: has no tokens"):
        list(generate(engine, {}, [Request([], 7, 0)], PLAIN, 0, 0, slots=1, max_response=4))
    with pytest.raises(InputError, match="slots = 0"):
        list(generate(engine, {}, requests(), PLAIN, 0, 0, slots=0, max_response=4))
    engine = engine_of(Layout(make_mesh(8, 1, 1), ROLLOUT))
    with pytest.raises(InputError, match="multiple of the 8 batch shards"):
        list(generate(engine, {}, requests(), PLAIN, 0, 0, slots=12, max_response=4))


def collective_sizes_in_loops(program: str) -> list[int]:
    """Elements of the results of all collectives in the bodies of while loops and what these call."""
    bodies, name = {}, ""
    for line in program.splitlines():
        start = re.match(r"(?:ENTRY )?%([\w.-]+) .*\{$", line)
        name = start[1] if start else name
        bodies.setdefault(name, []).append(line)
    todo = re.findall(r"(?:body|condition)=%([\w.-]+)", program)
    assert todo
    sizes, seen = [], set()
    while todo:
        name = todo.pop()
        for line in bodies.get(name, []) if name not in seen else []:
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", line)
            result = re.search(r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)", line)
            for shape in re.findall(r"\[([\d,]*)\]", result[1]) if result else []:
                sizes.append(int(np.prod([int(n) for n in shape.split(",") if n])))
        seen.add(name)
    return sizes
