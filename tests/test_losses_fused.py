"""What the fused form promises beyond the formulas: chunks, masks, padded vocabularies, precision, meshes, memory."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from opd_jax.errors import InputError
from opd_jax.losses import Objective, Readout, distillation_loss, reference_loss
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.top_k import top_k

FULL = Objective()
EQ5 = Objective(name="topk", k=5)
TAIL = Objective(name="topk", k=5, tail=True, support="union")
AXES = (("batch", None, None), ("vocab", "embed")) * 2 + (("batch", None),) * 2  # hidden, head, twice; tokens, mask
# The tests compile many small programs and run each once.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def problem(vocab=41, batch=8, steps=6, width=8, teacher_width=16, seed=0) -> Any:
    r = np.random.default_rng(seed)
    h, w = r.normal(size=(batch, steps, width)), r.normal(size=(vocab, width)) * 0.7
    g, u = r.normal(size=(batch, steps, teacher_width)), r.normal(size=(vocab, teacher_width)) * 0.5
    lengths = r.integers(1, steps + 1, batch)
    mask = np.arange(steps) < lengths[:, None]
    y = r.integers(0, vocab, (batch, steps))
    return (*(jnp.asarray(x, jnp.float32) for x in (h, w, g, u)), jnp.asarray(y), jnp.asarray(mask))


def gradients(objective, **options):
    def run(h, w, *fixed: Any):
        def loss(h, w):
            (total, count), metrics = distillation_loss(h, w, *fixed, objective=objective, **options)
            return total, (count, metrics)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(h, w)

    return run


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3)


def test_chunks_and_tiles_do_not_matter():
    def run(chunk, tile):
        full = gradients(FULL, chunk=chunk, tile=tile)
        others = (gradients(o, chunk=chunk, tile=tile, metrics=False) for o in (EQ5, TAIL))
        return jit(lambda *x: [f(*x) for f in (full, *others)])(*problem())

    close(run(7, 3), run(512, None))


@functools.cache
def on_one_device(vocab):
    return jax.device_get(jit(for_meshes(None))(*problem(vocab=vocab)))


def for_meshes(layout):
    r = np.random.default_rng(7)
    behaviour, advantages, bias = -r.uniform(1, 3, (8, 6)), r.normal(size=(8, 6)), r.normal(size=64)
    runs = [
        gradients(FULL, layout=layout, tile=2, chunk=4),
        gradients(EQ5, layout=layout, tile=2, metrics=False, topk_ids=jnp.tile(jnp.arange(5), (8, 6, 1))),
        gradients(TAIL, layout=layout, tile=2, metrics=False),
        gradients(Objective(name="topk", k=5, support="overlap"), layout=layout, metrics=False),
        gradients(
            Objective(name="sampled", correction="tis"), layout=layout, metrics=False,
            behaviour_logp=jnp.float32(behaviour), advantages=jnp.float32(advantages),
        ),
    ]  # fmt: skip

    def run(*x):
        readout = Readout(jnp.float32(bias[: x[1].shape[0]]), softcap=4.0)
        more = [gradients(o, layout=layout, metrics=False, student_readout=readout, topk_ids=i) for o, i in capped]
        return [f(*x) for f in [*runs, *more]]

    ids = jnp.tile(jnp.arange(3, 8), (8, 6, 1))
    capped = [(FULL, None), (EQ5, ids)]
    return run


@pytest.mark.parametrize(
    ("shape", "vocab"),
    [
        pytest.param((8, 1, 1), 48, marks=pytest.mark.exhaustive),
        pytest.param((1, 8, 1), 48, marks=pytest.mark.exhaustive),
        ((2, 2, 2), 48),
        pytest.param((1, 1, 8), 48, marks=pytest.mark.exhaustive),
        ((1, 2, 4), 41),
    ],
)
def test_meshes_do_not_matter(shape, vocab):
    layout = Layout(make_mesh(*shape))
    split = [a if all(n % 8 == 0 for n in x.shape[:1]) else () for x, a in zip(problem(vocab), AXES, strict=True)]
    sharded = [jax.device_put(x, layout.sharding(a)) for x, a in zip(problem(vocab), split, strict=True)]
    got = jit(for_meshes(layout))(*sharded)
    close(jax.device_get(got), on_one_device(vocab))
    assert got[0][1][0].sharding.is_equivalent_to(NamedSharding(layout.mesh, layout.spec(AXES[0])), 3)
    if vocab == 48:
        assert got[0][1][1].sharding.is_equivalent_to(NamedSharding(layout.mesh, layout.spec(AXES[1])), 2)


def test_logits_stay_in_their_vocabulary_shard():
    layout = Layout(make_mesh(1, 2, 4))
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(a))
        for x, a in zip(problem(vocab=4096), AXES, strict=True)
    ]
    run = gradients(Objective(name="topk", k=5, support="union", tail=True), layout=layout)
    text = str(jit(run).lower(*shapes).compile().as_text())
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? (?:all-gather|all-to-all)", text)
    assert gathered
    wide = [shape for _, shape in gathered if "4096" in shape.split(",")]
    assert not wide, "only the heads are gathered, over fsdp, a quarter each"


def test_no_collective_inside_the_scan():
    layout = Layout(make_mesh(4, 2, 1))
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(a))
        for x, a in zip(problem(vocab=48), AXES, strict=True)
    ]
    text = str(jit(gradients(FULL, layout=layout, tile=1, chunk=2)).lower(*shapes).compile().as_text())
    entry = text[text.index("\nENTRY") :]
    collective = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")
    assert collective.search(entry), "the head gradient must be reduced somewhere"
    assert len(collective.findall(text)) == len(collective.findall(entry))


def test_nothing_under_the_mask_matters():
    h, w, g, u, y, mask = problem()
    ids = jnp.tile(jnp.arange(5), (8, 6, 1))
    keep = mask[..., None]
    bad = (jnp.where(keep, h, jnp.nan), w, jnp.where(keep, g, jnp.inf), u, jnp.where(mask, y, -7), mask)
    cases = [(FULL, True), (Objective(name="sampled"), False), (EQ5, False), (TAIL, False)]
    run = jit(lambda ids, *x: [gradients(o, topk_ids=ids, metrics=m)(*x) for o, m in cases])
    clean, dirty = run(ids, h, w, g, u, y, mask), run(jnp.where(keep, ids, 10**6), *bad)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert not any(np.any(np.where(keep, 0, dh)) for _, (dh, _) in dirty)


def test_padding_ids_carry_no_probability():
    h, w, g, u, y, mask = problem()
    r = np.random.default_rng(1)
    w_wide = jnp.concatenate([w, 50 * r.normal(size=(7, 8)).astype("f4")])
    u_wide = jnp.concatenate([u, 50 * r.normal(size=(23, 16)).astype("f4")])
    objectives = (FULL, Objective(name="topk", k=50), TAIL)
    exact = jit(lambda *x: [gradients(o, metrics=o is FULL)(*x) for o in objectives])(h, w, g, u, y, mask)
    padded = jit(lambda *x: [gradients(o, vocab_size=41, metrics=o is FULL)(*x) for o in objectives])(
        h, w_wide, g, u_wide, y, mask
    )
    for (want, (dh, dw)), (got, (wide_dh, wide_dw)) in zip(exact, padded, strict=True):
        close((got, wide_dh, wide_dw[:41]), (want, dh, dw))
        assert wide_dw.shape == (48, 8)
        assert not np.any(wide_dw[41:])
    reference = jit(lambda *x: reference_loss(*x, objective=TAIL, vocab_size=41))(h, w_wide, g, u_wide, y, mask)
    np.testing.assert_allclose(reference[0], exact[-1][0][0], rtol=1e-5)


def test_equal_models_of_different_padded_width_are_at_rest():
    h, w, _, _, y, mask = problem()
    padded = jnp.pad(w, ((0, 10), (0, 0)))
    for student, teacher in ((w, padded), (padded, w)):
        (loss, (_, metrics)), grads = jit(gradients(FULL))(h, student, h, teacher, y, mask)
        assert abs(loss) < 1e-6
        assert abs(metrics["reverse_kl"][0]) < 1e-6
        assert max(np.abs(x).max() for x in grads) < 1e-6


def test_teacher_gets_no_gradient():
    h, w, g, u, y, mask = problem()
    dg, du = jit(jax.grad(lambda g, u: distillation_loss(h, w, g, u, y, mask, FULL)[0][0], (0, 1)))(g, u)
    assert not np.any(dg)
    assert not np.any(du)


def test_logits_are_formed_once_and_never_all():
    def evaluate(*x: Any):
        return distillation_loss(*x, objective=FULL)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in problem(vocab=4099, batch=4, steps=512)]
    products = [str(jax.make_jaxpr(f)(*shapes)).count("dot_general")
                for f in (gradients(FULL), evaluate)]  # fmt: skip
    assert products == [4 + 2, 2 + 2]  # two small ones add metrics up over positions
    memory: Any = jax.jit(gradients(FULL, chunk=128, tile=32)).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 512 * 4099 * 4 / 4


def test_given_ids_spare_the_vocabulary_products():
    h, w, g, u, y, mask = problem(vocab=4099)
    ids = jnp.tile(jnp.arange(5), (8, 6, 1))
    run = gradients(EQ5, metrics=False, topk_ids=ids)
    assert not re.search(r"f32\[\d+,4099\]", str(jax.make_jaxpr(run)(h, w, g, u, y, mask)))


@pytest.mark.parametrize("vocab", [7, 41, 1000, 4099])
def test_top_k_with_ties(vocab):
    x = np.random.default_rng(0).integers(0, vocab // 3, (20, vocab)).astype("f4")
    k = min(vocab, 16)
    np.testing.assert_array_equal(top_k(jnp.asarray(x), k), np.argsort(-x, axis=-1, kind="stable")[:, :k])


def test_bad_input_is_named():
    h, w, g, u, y, mask = problem()
    with pytest.raises(InputError, match="vocab_size = 42"):
        distillation_loss(h, w, g, u, y, mask, FULL, vocab_size=42)
    with pytest.raises(InputError, match="topk_ids holds 3"):
        distillation_loss(h, w, g, u, y, mask, EQ5, topk_ids=jnp.zeros((8, 6, 3), int))
    with pytest.raises(InputError, match="teacher hidden states"):
        distillation_loss(h, w, h, u, y, mask, FULL)
    with pytest.raises(InputError, match="mask has shape"):
        distillation_loss(h, w, g, u, y, mask[:, 1:], FULL)
    with pytest.raises(InputError, match="needs behaviour_logp"):
        distillation_loss(h, w, g, u, y, mask, Objective(name="sampled", correction="tis"))
    with pytest.raises(InputError, match="weights a policy gradient"):
        distillation_loss(h, w, g, u, y, mask, Objective(correction="tis"), behaviour_logp=jnp.zeros((8, 6)))
    with pytest.raises(InputError, match="advantages has shape"):
        distillation_loss(h, w, g, u, y, mask, FULL, advantages=jnp.zeros((8, 5)))
    with pytest.raises(InputError, match="weights has shape"):
        distillation_loss(h, w, g, u, y, mask, FULL, weights=jnp.zeros((8, 5)))
    with pytest.raises(InputError, match="bias of student_readout"):
        distillation_loss(h, w, g, u, y, mask, FULL, student_readout=Readout(jnp.zeros(40)))
    with pytest.raises(InputError, match="axis 'batch' has size 6"):
        distillation_loss(h[:6], w, g[:6], u, y[:6], mask[:6], FULL, layout=Layout(make_mesh(8, 1, 1)))
