"""Loss, gradient and optimizer step against closed forms in NumPy float64, naive dense versions, and torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import small_models
import tiny_runs
from tiny_runs import STUDENT, TEACHER, VOCAB, distance

from opd_jax.config import Objective, Optimizer
from opd_jax.data.pipeline import Example
from opd_jax.losses.log_probs import cross_entropy
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import forward
from opd_jax.models.hf import load_model, save_model
from opd_jax.objectives.opd import opd_loss
from opd_jax.objectives.sft import sft_loss
from opd_jax.sampling.packing import pack, pack_texts
from opd_jax.teacher import make_score
from opd_jax.tracking.run_dir import existing_run, read_rows
from opd_jax.training.loop import train
from opd_jax.training.optimizer import make_optimizer, make_schedule
from opd_jax.training.state import TrainState, create_state, state_shardings
from opd_jax.training.step import global_gradient, make_update
from opd_jax.types import Params, Scores

ONE = Layout(make_mesh(1, devices=jax.devices()[:1]))
gradient = jax.jit(global_gradient, static_argnums=0, static_argnames="micro_batch")
SFT = functools.partial(sft_loss, config=STUDENT, vocab_size=VOCAB, dtype=jnp.float32)


def opd(params: Params, rows: Any, hidden: Any, teacher_head: Any, objective: Objective = Objective(k=4)) -> Any:
    settings = {"config": STUDENT, "objective": objective, "vocab_size": VOCAB, "dtype": jnp.float32}
    return opd_loss(params, rows, Scores(hidden, teacher_head), **settings)


LOSSES = {
    "sft": SFT,
    "full": opd,
    "topk": functools.partial(opd, objective=Objective(name="topk", k=4)),
    "sampled": functools.partial(opd, objective=Objective(name="sampled", k=4)),
}


@functools.cache
def opd_batch(separate: bool = True) -> tuple[Any, Any]:
    """((rows, teacher's hidden states), teacher's head)."""
    rows = pack(tiny_runs.make_rollouts(), separate=separate)
    scores = make_score(TEACHER, dtype=jnp.float32, layout=None)(tiny_runs.params_of(TEACHER, 1), rows)
    return (rows, scores.hidden), scores.head


@pytest.mark.parametrize("T", [5, 64, 150])
def test_cross_entropy_equals_the_closed_form(T: int) -> None:
    """−Σ log p(y), (p − 1_y) W and Σ (p − 1_y) hᵀ; |V| and T are multiples of nothing."""
    rng = np.random.default_rng(T)
    V, valid, D, B = 37, 35, 6, 3
    h, w = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    tokens, mask = rng.integers(0, valid, (B, T)), rng.random((B, T)) < 0.6
    z = h @ w[:valid].T
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    onehot = np.eye(valid)[tokens]
    slope = (p - onehot) * mask[..., None]
    dw = np.concatenate([np.einsum("btv,btd->vd", slope, h), np.zeros((V - valid, D))])

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(h: Any, w: Any) -> Any:
        (total, count), metrics = cross_entropy(h, w, jnp.asarray(tokens), jnp.asarray(mask), vocab_size=valid)
        return total, (count, metrics)

    (total, (count, metrics)), grads = loss(jnp.float32(h), jnp.float32(w))
    np.testing.assert_allclose(total, -np.log(p[onehot > 0][mask.reshape(-1)]).sum(), rtol=1e-5)
    assert count == mask.sum()
    assert metrics["token_accuracy"][0] == ((z.argmax(-1) == tokens) & mask).sum()
    assert distance(grads, (slope @ w[:valid], dw)) < 1e-5


def test_sft_loss_and_gradient_equal_the_naive_ones() -> None:
    """All logits at once, trained tokens picked by index, no mask against padding (it comes after), plain autodiff."""
    params = tiny_runs.params_of(STUDENT, 0)
    tokens, ends, starts = padded(examples := tiny_runs.make_examples())
    trained = [(row, t) for row in range(len(tokens)) for t in range(starts[row], ends[row])]
    row, column = np.array(trained).T

    @jax.jit
    @jax.value_and_grad
    def naive(params: Params) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = forward(params, STUDENT, jnp.asarray(tokens), positions, jnp.ones_like(positions))
        logp = jax.nn.log_softmax((hidden @ params["embed"].T)[..., :VOCAB])
        return -logp[row, column - 1, tokens[row, column]].mean()

    want, want_grads = naive(params)
    grads, loss, _ = gradient(SFT, params, pack_texts(examples, 6, 6))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert distance(grads, want_grads) < 1e-5


def padded(examples: list[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left-aligned rows, random ids also where nothing must be read; their ends and where their responses start."""
    starts, ends = np.array([(len(e.prompt), len(e.prompt) + len(e.response)) for e in examples]).T
    tokens = np.random.default_rng(2).integers(0, VOCAB, (len(examples), max(ends)))
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example.prompt) + len(example.response)] = example.prompt + example.response
    return tokens, ends, starts


@pytest.mark.torch
@pytest.mark.parametrize("model", ["qwen2_tied", "llama3_rope", "qwen3"])
def test_sft_step_equals_torch(model: str, tmp_path: Path) -> None:
    """Loss, gradient, clip and one AdamW step of a whole model in transformers and torch, padded there, packed here."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    path = small_models.write(model, tmp_path / "model")
    params, network = load_model(path)
    examples = tiny_runs.make_examples()
    batch = pack_texts(examples, 6, 6)
    settings = Optimizer(lr=1e-2, weight_decay=0.1, clip=0.5)
    optimizer, _ = make_optimizer(settings, 10)
    loss_fn = functools.partial(sft_loss, config=network, vocab_size=network.vocab_size, dtype=jnp.float32)
    shardings = state_shardings(optimizer, network, ONE)
    state = create_state(params, optimizer, shardings)
    grads, loss, _ = gradient(loss_fn, state.params, batch)
    state, metrics = make_update(loss_fn, optimizer, shardings=shardings, layout=ONE)(state, batch)

    oracle = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").train()
    tokens, lengths, starts = (torch.tensor(x).long() for x in padded(examples))
    columns = torch.arange(tokens.shape[1])[None]
    labels = tokens.masked_fill((columns < starts[:, None]) | (columns >= lengths[:, None]), -100)
    out = oracle(tokens, attention_mask=(columns < lengths[:, None]).long(), labels=labels)
    out.loss.backward()
    assert abs(float(loss) - out.loss.item()) < 1e-5
    weights: dict[str, Any] = dict(oracle.named_parameters())
    got = by_name(grads, network, tmp_path / "gradient")
    want = {name: weights[name].grad.numpy() for name in got}
    assert distance(got, want) < 1e-5
    assert max(distance(got[name], want[name]) for name in got) < 1e-4  # each array against its own norm

    decayed = {n: not n.endswith(("norm.weight", "bias")) for n in weights}
    groups = [
        {"params": [weights[n] for n in weights if decayed[n] == d], "weight_decay": 0.1 * d} for d in (True, False)
    ]
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
    assert norm.item() > 0.5
    np.testing.assert_allclose(metrics["gradient_norm"][0], norm.item(), rtol=1e-5)
    torch.optim.AdamW(groups, lr=1e-2, eps=1e-8).step()
    for name, got in by_name(state.params, network, tmp_path / "updated").items():
        # Adam's first step is ±lr whatever the gradient's size, so a gradient that is rounding alone has no sign
        sure = np.abs(weights[name].grad.numpy()) > 1e-6
        np.testing.assert_allclose(got[sure], weights[name].detach().numpy()[sure], rtol=0, atol=2e-5)


def by_name(params: Params, network: Any, path: Path) -> dict[str, np.ndarray]:
    save_model(path, params, network)
    return safetensors.numpy.load_file(path / "model.safetensors")


def toy_loss(params: Params, rows: Params) -> Any:
    """Σ params · rows: the gradient of the mean is the mean of the rows."""
    products = jax.tree.map(lambda w, x: jnp.sum(w[None] * x), params, rows)
    return (sum(jax.tree.leaves(products)), jnp.int32(jax.tree.leaves(rows)[0].shape[0])), {}


def toy_tree(rng: np.random.Generator, *lead: int) -> Params:
    shapes = {"embed": (5, 3), "layers": {"attention_norm": (2, 3), "q": (2, 4, 3), "q_bias": (2, 4)}, "norm": (3,)}
    return jax.tree.map(
        lambda s: rng.normal(size=(*lead, *s)).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def test_adamw_equals_the_closed_form() -> None:
    """Five steps with warm-up, decay of matrices only, and a clip that binds in some steps."""
    rng = np.random.default_rng(0)
    settings = Optimizer(lr=1e-2, warmup=2, schedule="linear", b1=0.8, b2=0.95, weight_decay=0.3, clip=2.5)
    optimizer, _ = make_optimizer(settings, 6)
    start = toy_tree(rng)
    state = TrainState(jnp.int32(0), jnp.int32(0), jax.tree.map(jnp.asarray, start), optimizer.init(start))
    update = make_update(toy_loss, optimizer, shardings=jax.tree.map(lambda _: ONE.sharding(), state), layout=ONE)
    w = {jax.tree_util.keystr(k): v.astype(np.float64) for k, v in jax.tree.leaves_with_path(start)}
    m, v = ({k: np.zeros_like(x) for k, x in w.items()} for _ in range(2))
    clipped = []
    for t, lr in enumerate([0.005, 0.01, 0.01, 0.0075, 0.005], start=1):
        rows = jax.tree.map(lambda x, t=t: x * np.float32(0.3 * t), toy_tree(rng, 4))
        g = {jax.tree_util.keystr(k): x.astype(np.float64).mean(0) for k, x in jax.tree.leaves_with_path(rows)}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        clipped.append(norm > 2.5)
        for k in w:
            gk = g[k] * min(1, 2.5 / norm)
            m[k] = 0.8 * m[k] + 0.2 * gk
            v[k] = 0.95 * v[k] + 0.05 * gk**2
            step = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            w[k] -= lr * (step + (0.3 * w[k] if "norm" not in k and "bias" not in k else 0))
        state, metrics = update(state, rows)
        np.testing.assert_allclose(metrics["gradient_norm"][0], norm, rtol=1e-6)
    assert {True, False} == set(clipped)
    assert int(state.step) == 5
    for path, got in jax.tree.leaves_with_path(state.params):
        np.testing.assert_allclose(got, w[jax.tree_util.keystr(path)], rtol=0, atol=1e-6)


@pytest.mark.torch
def test_adamw_equals_torch() -> None:
    """Steps of torch.optim.AdamW, its gradient clip included, from the same gradients."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    settings = Optimizer(lr=1e-2, b1=0.9, b2=0.98, weight_decay=0.1, clip=1.0)
    optimizer, _ = make_optimizer(settings, 9)
    start = toy_tree(rng)
    params, moments = jax.tree.map(jnp.asarray, start), optimizer.init(start)
    theirs = {jax.tree_util.keystr(k): torch.nn.Parameter(torch.tensor(x)) for k, x in jax.tree.leaves_with_path(start)}
    plain = [w for k, w in theirs.items() if "norm" in k or "bias" in k]
    matrices = [w for k, w in theirs.items() if not ("norm" in k or "bias" in k)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    opponent = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8)
    for _ in range(4):
        grads = toy_tree(rng)
        for k, g in jax.tree.leaves_with_path(grads):
            theirs[jax.tree_util.keystr(k)].grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        opponent.step()
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
    for k, w in jax.tree.leaves_with_path(params):
        np.testing.assert_allclose(w, theirs[jax.tree_util.keystr(k)].detach().numpy(), rtol=0, atol=1e-6)


def test_a_first_moment_in_bfloat16() -> None:
    start = jax.tree.map(jnp.asarray, toy_tree(np.random.default_rng(0)))
    moments = [make_optimizer(Optimizer(moment_dtype=t), 5)[0].init(start) for t in ("float32", "bfloat16")]
    whole, half = (sum(x.nbytes for x in jax.tree.leaves(m)) for m in moments)
    assert whole - half == sum(x.nbytes for x in jax.tree.leaves(start)) // 2


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, [1.0] * 6),
        ({"warmup": 1}, [1.0] * 6),
        ({"warmup": 3}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"warmup": 9}, [1 / 9, 2 / 9, 3 / 9, 4 / 9, 5 / 9, 6 / 9]),
        ({"schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "linear", "warmup": 2}, [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"schedule": "wsd", "warmup": 1, "decay": 3}, [1, 1, 1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "wsd", "decay": 9}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "cosine", "warmup": 2}, [0.5, 1, *(0.5 + 0.5 * np.cos(np.pi * np.arange(4) / 4))]),
    ],
    ids=str,
)
def test_schedules(settings: dict[str, Any], want: list[float]) -> None:
    schedule = make_schedule(Optimizer(lr=2e-3, **settings), 6)
    np.testing.assert_allclose(np.array([schedule(i) for i in range(6)]), np.multiply(want, 2e-3), rtol=1e-6)


@pytest.mark.parametrize("separate", [True, False], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "kind", ["full", "sft", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("topk", "sampled"))]
)
def test_the_result_does_not_depend_on_micro_batches(kind: str, separate: bool) -> None:
    """Ragged rows: a mean of the micro-batches' means would differ by some per cent."""
    params, loss_fn = tiny_runs.params_of(STUDENT, 0), LOSSES[kind]
    if kind == "sft":
        batch, frozen = (pack_texts(tiny_runs.make_examples(), 6, 6, separate=separate),), None
    else:
        batch, frozen = opd_batch(separate)

    grads, loss, metrics = gradient(loss_fn, params, *batch, frozen=frozen, micro_batch=8)
    assert np.isfinite(loss)
    for micro_batch in (2, 1):
        other_grads, other_loss, other_metrics = gradient(
            loss_fn, params, *batch, frozen=frozen, micro_batch=micro_batch
        )
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        assert distance(other_grads, grads) < 1e-5
        assert other_metrics.keys() == metrics.keys()
        for name in metrics.keys() - {"padding"}:  # passes without a sequence do not run
            total, count = metrics[name]
            np.testing.assert_allclose(other_metrics[name][0], total, rtol=1e-5, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(other_metrics[name][1], count, err_msg=name)


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    """NaN at one trained position: weights and optimizer stay bit by bit, the step counts, the next one is as usual."""
    optimizer, _ = make_optimizer(Optimizer(lr=1e-3), 10)
    params, (batch, teacher_head) = tiny_runs.params_of(STUDENT, 0), opd_batch()
    rows, hidden = batch
    shardings = state_shardings(optimizer, STUDENT, ONE)
    new_state = functools.partial(create_state, params, optimizer, shardings)
    update = make_update(opd, optimizer, shardings=shardings, layout=ONE)
    want, want_metrics = jax.device_get(update(new_state(), rows, hidden, frozen=teacher_head))

    before = jax.device_get(new_state())
    given = new_state()
    state, metrics = update(given, rows, hidden.at[1, int(rows.depth[1].argmax())].set(jnp.nan), frozen=teacher_head)
    assert not np.isfinite(metrics["loss"][0])
    assert (int(state.step), int(state.skipped)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    assert all(x.is_deleted() for x in jax.tree.leaves(given.params))  # donated: no second copy of the weights

    state, metrics = update(state, rows, hidden, frozen=teacher_head)
    assert (int(state.step), int(state.skipped)) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (want.params, want.opt_state))
    np.testing.assert_array_equal(metrics["loss"][0], want_metrics["loss"][0])
    assert update._cache_size() == 1


def test_nan_where_nothing_is_trained_does_not_matter() -> None:
    params, ((rows, hidden), teacher_head) = tiny_runs.params_of(STUDENT, 0), opd_batch()
    want = gradient(opd, params, rows, hidden, frozen=teacher_head)
    poisoned = jnp.where(rows.mask[..., None], hidden, jnp.nan)
    got = gradient(opd, params, rows, poisoned, frozen=teacher_head)
    jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])


@pytest.mark.exhaustive
def test_metrics_at_an_interval_change_no_step(tmp_path: Path) -> None:
    """Sampled, corrected by the rollouts' own log-probs; Eqs. 6-10 at steps 1 and 4 only, and a report all the same."""
    models = tiny_runs.write_models(tmp_path / "models")
    settings: Any = {"steps": 5, "objective": {"name": "sampled", "correction": "tis", "k": 4}}
    rows = []
    for every in (1, 3):
        run_dir = tmp_path / f"every-{every}"
        train(tiny_runs.run_config(models, run_dir, metrics_every=every, **settings))
        rows.append(read_rows(existing_run(str(run_dir)).metrics))
        assert (run_dir / "report.html").exists()
    always, sometimes = rows
    np.testing.assert_allclose([r["loss"] for r in sometimes], [r["loss"] for r in always], rtol=1e-4)
    np.testing.assert_allclose([r["loss"] for r in always], [r["kl_k1"] for r in always], rtol=1e-3)
    assert [r["step"] for r in sometimes if "overlap_ratio" in r] == [1, 4]
