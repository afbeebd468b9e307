"""Every objective in value and gradient: closed forms in NumPy float64, the facts of the paper, peers' numbers."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import Objective, Readout, distillation_loss, position_weights, reference_loss, token_losses

SUPPORTS = ("student", "teacher", "overlap", "non_overlap", "union")
DIVERGENCES = (
    dict(divergence="reverse"),
    dict(divergence="forward"),
    dict(divergence="jsd", beta=0.1),
    dict(divergence="skew", alpha=0.3),
)
CLOSURES = (dict(normalise=True), dict(normalise=False), dict(tail=True))
CASES: list[dict[str, Any]] = [
    dict(name="sampled"),
    *(dict(name="full", **d) for d in DIVERGENCES),
    *(dict(name="full", divergence="jsd", beta=b) for b in (0.0, 0.5, 1.0)),
    dict(name="full", temperature=1.7),
    *(dict(name="topk", k=5, support=s, **d, **c) for s in SUPPORTS for d in DIVERGENCES for c in CLOSURES),
    dict(name="topk", k=5, support="union", tail=True, temperature=0.6),
    *(dict(name="topk_reference", k=5, support=s, normalise=n) for s in SUPPORTS for n in (True, False)),
]
EVERY = [(distillation_loss, v, t) for v in (7, 41, 1000, 4099) for t in ("float64", "float32", "bfloat16")]
EVERY += [(reference_loss, v, "float64") for v in (7, 41, 1000, 4099)]
IN_CI = {(7, "bfloat16"), (41, "float32"), (4099, "float64")}  # each type
ORACLES = Path(__file__).parents[2] / "shared/oracles/peer_losses.npz"


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def support(s, t, o, ids):
    k = min(o.k, len(s))
    in_p = set((np.argsort(-s, kind="stable") if ids is None else ids)[:k].tolist())
    in_q = set(np.argsort(-t, kind="stable")[:k].tolist())
    sets = dict(student=in_p, teacher=in_q, overlap=in_p & in_q, non_overlap=in_p ^ in_q, union=in_p | in_q)
    return np.array(sorted(sets[o.support]), int)


def value_and_slope(p, q, o):
    """Divergence of (possibly partial) p, q, and its derivative in each p."""
    b, a = o.beta, o.alpha
    if o.divergence == "reverse" or (o.divergence == "jsd" and b == 1):
        return (p * np.log(p / q)).sum(), np.log(p / q) + 1
    if o.divergence == "forward" or (o.divergence == "jsd" and b == 0):
        return (q * np.log(q / p)).sum(), -q / p
    m = (1 - b) * p + b * q if o.divergence == "jsd" else (1 - a) * p + a * q
    if o.divergence == "jsd":
        value = b * (q * np.log(q / m)).sum() + (1 - b) * (p * np.log(p / m)).sum()
        return value, (1 - b) * (np.log(p / m) + 1 - b * q / m - (1 - b) * p / m)
    return (p * np.log(p / m)).sum(), np.log(p / m) + 1 - (1 - a) * p / m


def closed_form(s, t, y, o, ids=None):
    """Loss of one token and its gradient in the student's logits."""
    s, t = s / o.temperature, t / o.temperature
    p, q = softmax(s), softmax(t)
    ratio = np.log(p / q)
    if o.name == "sampled":
        return ratio[y], (np.eye(len(s))[y] - p) * ratio[y] / o.temperature
    S = np.arange(len(s)) if o.name == "full" else support(s, t, o, ids)
    if len(S) == 0 and not o.tail:
        return 0.0, np.zeros_like(s)
    if o.name == "topk_reference":
        cost = np.zeros_like(s)
        cost[S] = (softmax(s[S]) if o.normalise else p[S]) * ratio[S]
        return cost.sum(), (cost - p * cost.sum()) / o.temperature
    slope, grad = np.zeros_like(s), np.zeros_like(s)
    if o.name == "full" or not o.normalise:
        value, slope[S] = value_and_slope(p[S], q[S], o)
    elif o.tail:
        out = np.setdiff1d(np.arange(len(s)), S)
        if len(out) == 0:
            value, slope[S] = value_and_slope(p[S], q[S], o)
        else:
            value, w = value_and_slope(np.append(p[S], p[out].sum()), np.append(q[S], q[out].sum()), o)
            slope[S], slope[out] = w[:-1], w[-1]
    else:
        pbar = softmax(s[S])
        value, w = value_and_slope(pbar, softmax(t[S]), o)
        grad[S] = pbar * (w - (pbar * w).sum())
        return value, grad / o.temperature
    return value, p * (slope - (p * slope).sum()) / o.temperature


def problem(vocab, seed=0, batch=3, steps=4, width=6, teacher_width=9) -> Any:
    r = np.random.default_rng(seed)
    h, w = r.normal(size=(batch, steps, width)), r.normal(size=(vocab, width)) * 0.7
    g, u = r.normal(size=(batch, steps, teacher_width)), r.normal(size=(vocab, teacher_width)) * 0.7
    u[:, :width] += 0.5 * w
    g[..., :width] += h
    mask = np.arange(steps)[None] < np.array([steps, 2, 3])[:batch, None]
    return h, w, g, u, r.integers(0, vocab, (batch, steps)), mask


def expected(h, w, g, u, y, mask, o, ids=None):
    """Loss sum and gradients in hidden and head."""
    loss, dlogits = expected_in_logits(h @ w.T, g @ u.T, y, mask, o, ids)
    return loss, dlogits @ w, np.einsum("btv,btd->vd", dlogits, h)


def expected_in_logits(s, t, y, mask, o, ids=None):
    loss, dlogits = 0.0, np.zeros_like(s)
    for i in zip(*np.nonzero(mask), strict=True):
        value, dlogits[i] = closed_form(s[i], t[i], y[i], o, None if ids is None else ids[i])
        loss += value
    return loss, dlogits


def actual(loss_fn, inputs, cases, **options):
    """(loss, gradient in hidden, gradient in head) of each case, compiled together and cheaply: there are many."""

    def gradients(h, w, *fixed):
        def loss(h, w, o):
            sums = loss_fn(h, w, *fixed, objective=o, **options)
            return sums[0] if loss_fn is reference_loss else sums[0][0]

        each = (jax.value_and_grad(loss, (0, 1))(h, w, Objective(**case)) for case in cases)
        return [(value, *grads) for value, grads in each]

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.device_get(jax.jit(gradients, compiler_options=quick)(*map(jnp.asarray, inputs)))


def fused(inputs, cases, **options):
    return actual(distillation_loss, inputs, cases, metrics=False, **options)


def check(got, want, tolerance, case):
    for a, b, what in zip(got, want, ("loss", "hidden", "head"), strict=False):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=f"{case} {what}")


@pytest.mark.parametrize(
    ("loss_fn", "vocab", "cases"),
    [
        (distillation_loss, 7, CASES[::8]),
        (distillation_loss, 41, CASES),
        (distillation_loss, 1000, CASES[1::8]),
        (reference_loss, 7, CASES[3::12]),
        (reference_loss, 41, CASES[::2]),
    ],
)
def test_closed_forms_in_float64(loss_fn, vocab, cases):
    inputs = problem(vocab)
    with jax.enable_x64(True):
        results = fused(inputs, cases) if loss_fn is distillation_loss else actual(loss_fn, inputs, cases)
    for case, got in zip(cases, results, strict=True):
        assert all(x.dtype == jnp.float64 for x in got)
        check(got, expected(*inputs, o=Objective(**case)), 1e-10, case)


def check_rounded(vocab, dtype, cases):
    """Inputs rounded to ``dtype`` (master weights of the head in float32) against float64 on the rounded inputs."""
    *arrays, y, mask = problem(vocab, seed=1)
    inputs = [jnp.asarray(x, dtype) for x in arrays]
    rounded: Any = (*(np.asarray(x, float) for x in inputs), y, mask)
    inputs[1] = inputs[1].astype(jnp.float32)
    for case, got in zip(cases, fused((*inputs, y, mask), cases), strict=True):
        want = expected(*rounded, o=Objective(**case))
        assert [x.dtype for x in got] == [jnp.float32, dtype, jnp.float32]
        check(got[:1] if dtype == "bfloat16" else got, want, 1e-5, case)
        for a, b in zip(got[1:], want[1:], strict=True):
            assert np.linalg.norm(np.asarray(a, float) - b) <= 1e-2 * np.linalg.norm(b), case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_inputs(dtype):
    check_rounded(41, dtype, CASES[::10])


@pytest.mark.parametrize(
    ("loss_fn", "vocab", "dtype"),
    [pytest.param(*c, marks=pytest.mark.exhaustive if c[1:] in IN_CI else pytest.mark.long) for c in EVERY],
)
def test_every_objective_support_divergence_and_closure(loss_fn, vocab, dtype):
    if dtype == "float64":
        test_closed_forms_in_float64(loss_fn, vocab, CASES)
    else:
        check_rounded(vocab, dtype, CASES)


def test_given_ids_are_the_students_support():
    inputs = problem(41)
    ids = np.random.default_rng(1).permuted(np.tile(np.arange(41), (3, 4, 1)), axis=-1)[..., :8]
    cases: list[dict[str, Any]] = [dict(name="topk", k=5, support=s) for s in SUPPORTS]
    with jax.enable_x64(True):
        topk_ids = jnp.asarray(ids)
        results = zip(
            cases,
            fused(inputs, cases, topk_ids=topk_ids),
            actual(distillation_loss, inputs, cases, topk_ids=topk_ids),
            actual(reference_loss, inputs, cases, topk_ids=topk_ids),
            strict=True,
        )
    for case, *results_of_case in results:
        for got in results_of_case:
            check(got, expected(*inputs, o=Objective(**case), ids=ids), 1e-10, case)


CORRECTIONS = {
    "importance": lambda r, cost: r,
    "ppo": lambda r, cost: r if (r < 1.3 if cost < 0 else r > 0.6) else 0.0,
    "tis": lambda r, cost: min(r, 1.3),
    "icepop": lambda r, cost: r if 0.6 <= r <= 1.3 else 0.0,
}


@pytest.mark.parametrize("loss_fn", [distillation_loss, reference_loss])
def test_corrections_and_advantages(loss_fn):
    h, w, g, u, y, mask = problem(41)
    r = np.random.default_rng(2)
    s, t = h @ w.T, g @ u.T
    logp, logq = (np.log(softmax(z)) for z in (s, t))
    behaviour = np.take_along_axis(logp, y[..., None], -1)[..., 0] + 0.5 * r.normal(size=y.shape)
    reward, weights = r.normal(size=y.shape), r.uniform(size=y.shape)
    bounds = {"ppo": (0.6, 1.3), "tis": (None, 1.3), "icepop": (0.6, 1.3)}
    cases: list[dict[str, Any]] = []
    for name in CORRECTIONS:
        low, high = bounds.get(name, (None, None))
        base = dict(correction=name, ratio_low=low, ratio_high=high)
        cases += [dict(base, name="sampled"), dict(base, name="full"), dict(base, name="topk", k=5)]
    optional = dict(behaviour_logp=behaviour, advantages=reward, weights=weights)
    with jax.enable_x64(True):
        results = (fused if loss_fn is distillation_loss else functools.partial(actual, loss_fn))(
            (h, w, g, u, y, mask), cases, **jax.tree.map(jnp.asarray, optional)
        )
    outcomes = set()
    for case, got in zip(cases, results, strict=True):
        o = Objective(**case)
        dlogits = np.zeros_like(s)
        total = 0.0
        for i in zip(*np.nonzero(mask), strict=True):
            value, slope = (0.0, 0.0) if o.name == "sampled" else closed_form(s[i], t[i], y[i], o)
            cost = -reward[i] + (logp[i] - logq[i])[y[i]] * (o.name == "sampled")
            ratio = np.exp(logp[i][y[i]] - behaviour[i])
            weight = CORRECTIONS[o.correction](ratio, cost)
            clipped = max(ratio * cost, np.clip(ratio, 0.6, 1.3) * cost) if o.correction == "ppo" else weight * cost
            total += weights[i] * (value + clipped)
            dlogits[i] = weights[i] * (slope + weight * cost * (np.eye(41)[y[i]] - np.exp(logp[i])))
            outcomes.add((o.correction, weight == ratio))
        check(got, (total, dlogits @ w, np.einsum("btv,btd->vd", dlogits, h)), 1e-10, case)
    assert len(outcomes) == 7, "every correction but plain importance must have changed some weight, and kept some"


def test_on_policy_corrections_change_nothing():
    h, w, g, u, y, mask = problem(41)
    with jax.enable_x64(True):
        behaviour = jnp.log(softmax(h @ w.T))[np.arange(3)[:, None], np.arange(4), y]
        plain, *corrected = fused(
            (h, w, g, u, y, mask),
            [dict(name="sampled", correction=c) for c in ("none", *CORRECTIONS)],
            behaviour_logp=behaviour,
        )
    for got in corrected:
        check(got, plain, 1e-12, "ratio 1")


def test_corrected_gradient_is_unbiased_off_policy():
    h, w, g, u, *_ = problem(41)
    p = softmax(h[0, 0] @ w.T)
    mu = np.random.default_rng(3).dirichlet(np.full(41, 2.0))
    state = [np.tile(x[0, 0], (1, 41, 1)) for x in (h, g)]
    inputs = (state[0], w, state[1], u, np.arange(41)[None], np.ones((1, 41), bool))
    with jax.enable_x64(True):
        behaviour = jnp.asarray(np.log(mu)[None])
        importance, stale, full = fused(
            inputs,
            [dict(name="sampled", correction="importance"), dict(name="sampled"), dict()],
            behaviour_logp=behaviour,
        )
    np.testing.assert_allclose(mu @ importance[1][0], full[1][0, 0], atol=1e-12)
    assert np.abs(mu @ stale[1][0] - full[1][0, 0]).max() > 1e-2
    assert np.abs(p @ stale[1][0] - full[1][0, 0]).max() < 1e-12


@pytest.mark.parametrize("loss_fn", [distillation_loss, reference_loss])
def test_readouts_with_bias_scale_and_cap(loss_fn):
    h, w, g, u, y, mask = problem(41)
    r = np.random.default_rng(4)
    (b, c) = r.normal(size=(2, 41))
    cases: list[dict[str, Any]] = [
        dict(),
        dict(name="sampled"),
        dict(name="topk", k=5),
        dict(name="topk", temperature=0.7),
    ]
    raw_s, raw_t = 0.5 * (h @ w.T + b), g @ u.T + c
    s, t = 3 * np.tanh(raw_s / 3), raw_t
    with jax.enable_x64(True):
        readouts = dict(
            student_readout=Readout(jnp.asarray(b), scale=0.5, softcap=3.0), teacher_readout=Readout(jnp.asarray(c))
        )
        ids = jnp.asarray(np.argsort(-s, axis=-1, kind="stable"))
        runs = [fused, functools.partial(fused, topk_ids=ids)]
        if loss_fn is reference_loss:
            runs = [functools.partial(actual, reference_loss)]
        results = [run((h, w, g, u, y, mask), cases, **readouts) for run in runs]
    for result in results:
        for case, got in zip(cases, result, strict=True):
            total, slope = expected_in_logits(s, t, y, mask, Objective(**case))
            slope = slope * 0.5 * (1 - np.tanh(raw_s / 3) ** 2)
            check(got, (total, slope @ w, np.einsum("btv,btd->vd", slope, h)), 1e-10, case)


def test_weights_of_positions():
    got = position_weights(jnp.asarray([4, 2]), 5, discount=0.5, skip=1, depth=2.0)
    np.testing.assert_allclose(got, [[0, 0.5 * 1.5, 0.25 * 2, 0.125 * 2.5, 0], [0, 0.5 * 2, 0, 0, 0]])
    h, w, g, u, y, mask = problem(41)
    with jax.enable_x64(True):
        arrays: Any = tuple(map(jnp.asarray, (h, w, g, u, y, mask)))
        weights = jnp.asarray(np.random.default_rng(5).uniform(size=y.shape))
        losses = token_losses(*arrays, objective=Objective())
        (total, count), metrics = distillation_loss(*arrays, objective=Objective(), weights=weights)
        got = jax.device_get((losses, weights, total, count, metrics["reverse_kl"]))
    losses, weights, total, count, reverse_kl = got
    np.testing.assert_allclose([total, count], [(losses * weights).sum(), (weights * mask).sum()])
    np.testing.assert_allclose(reverse_kl, [losses.sum(), mask.sum()])


def test_limits_of_the_support():
    inputs = problem(41)
    cases: list[dict[str, Any]] = [
        {},
        dict(name="topk", k=41),
        dict(name="topk", k=1),
        dict(name="topk_reference", k=1),
    ]
    with jax.enable_x64(True):
        full, everything, one, published = fused(inputs, cases)
    check(everything, full, 1e-12, "k = |V| is full")
    assert not any(np.any(x) for x in one), "Eq. 5 on one id is 0"
    assert np.abs(published[1]).max() > 1e-2


def test_tail_bounds_full_from_below():
    inputs = problem(41)
    with jax.enable_x64(True):
        fixed: Any = tuple(map(jnp.asarray, inputs))
        full = token_losses(*fixed, objective=Objective())
        np.testing.assert_allclose(full.sum(), expected(*inputs, o=Objective())[0])
        assert not np.any(np.where(inputs[-1], 0, full))
        for name in ("student", "non_overlap"):
            assert np.all(
                token_losses(*fixed, objective=Objective(name="topk", k=5, support=name, tail=True)) <= full + 1e-12
            )


def test_student_equal_to_teacher_is_at_rest():
    h, w, _, _, y, mask = problem(41)
    # Not the unnormalised supports: a partial KL is lowered by moving mass out of the support.
    cases = [c for c in CASES if c.get("normalise", True) or c["name"] == "topk_reference"][1::5]
    with jax.enable_x64(True):
        results = fused((h, w, h, w, y, mask), cases)
    for case, result in zip(cases, results, strict=True):
        assert max(np.abs(x).max() for x in result) < 1e-12, case


def test_expected_sampled_gradient_is_the_gradient_of_full():
    h, w, g, u, *_ = problem(41)
    p = softmax(h[0, 0] @ w.T)
    mask = np.ones((1, 41), bool)
    state = (np.tile(h[0, 0], (1, 41, 1)), w, np.tile(g[0, 0], (1, 41, 1)), u, np.arange(41)[None], mask)
    with jax.enable_x64(True):
        sampled, full = fused(state, [dict(name="sampled"), dict()])
    np.testing.assert_allclose(p @ sampled[1][0], full[1][0, 0], atol=1e-12)


def test_published_objective_is_the_generalised_kl_over_its_mass():
    inputs = problem(41)

    def generalised(h, w, g, u, mask):
        logp, logq = jax.nn.log_softmax(h @ w.T), jax.nn.log_softmax(g @ u.T)
        p, ids = jax.lax.top_k(jnp.exp(logp), 5)
        logp, logq = (jnp.take_along_axis(x, ids, -1) for x in (logp, logq))
        per_token = (jnp.exp(logp) * (logp - logq) - jnp.exp(logp) + jnp.exp(logq)).sum(-1)
        return (per_token / jax.lax.stop_gradient(p.sum(-1)) * mask).sum()

    with jax.enable_x64(True):
        h, w, g, u, _, mask = map(jnp.asarray, inputs)
        want = jax.jit(jax.grad(generalised, (0, 1)))(h, w, g, u, mask)
        (got,) = fused(inputs, [dict(name="topk_reference", k=5)])
    for a, b in zip(got[1:], want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_empty_support_is_zero():
    s, t = np.zeros((2, 1, 1, 40), "f4")
    s[..., :5], t[..., 5:10] = 5, 5
    eye = np.eye(40, dtype="f4")
    inputs = (s, eye, t, eye, np.zeros((1, 1), int), np.ones((1, 1), bool))
    base: dict[str, Any] = dict(k=5, support="overlap")
    cases = [dict(base, name="topk", normalise=n, divergence=d) for n in (True, False) for d in ("reverse", "forward")]
    cases += [dict(base, name="topk", tail=True), dict(base, name="topk_reference")]
    for loss_fn in (reference_loss, distillation_loss):
        for case, (value, dh, dw) in zip(cases, actual(loss_fn, inputs, cases), strict=True):
            # All mass is in the tail then: log(1) of both sides, up to the rounding of two log-sum-exps.
            assert max(np.abs(x).max() for x in (value, dh, dw)) <= (1e-6 if "tail" in case else 0), case


@pytest.mark.skipif(not ORACLES.exists(), reason="peers' numbers are not part of the repository")
def test_peers_numbers():
    z = np.load(ORACLES)
    eye = np.eye(41)
    mask, n = z["in/mask"].astype(bool), z["in/mask"].sum()
    inputs = (z["in/student_logits"], eye, z["in/teacher_logits"], eye, z["in/ids"], mask)
    cases: dict[str, dict[str, Any]] = {
        "trl_jsd/beta0.0_tau1.0": dict(divergence="jsd", beta=0.0),
        "trl_jsd/beta0.5_tau1.0": dict(divergence="jsd", beta=0.5),
        "trl_jsd/beta1.0_tau1.0": dict(divergence="jsd", beta=1.0),
        "trl_student_topk/alpha1.0_tail0": dict(name="topk", k=5),
        "trl_student_topk/alpha1.0_tail1": dict(name="topk", k=5, tail=True),
        "verl_fkl_topk/clampNone": dict(name="topk", k=5, support="teacher", divergence="forward", normalise=False),
        "trl_sampled": dict(name="sampled"),
    }
    with jax.enable_x64(True):
        fixed: Any = tuple(map(jnp.asarray, inputs))
        values = jax.device_get(
            jax.jit(lambda *x: [token_losses(*x, objective=Objective(**c)) for c in cases.values()])(*fixed)
        )
        gradients = [dh for _, dh, _ in fused(inputs, list(cases.values()))]
    for name, value, gradient in zip(cases, values, gradients, strict=True):
        if name.startswith("verl"):  # its clamp at 0 comes after the sum over the support
            gradient, value = gradient * (value > 0)[..., None], value.clip(0)
            np.testing.assert_allclose(value, z[f"{name}/distillation_losses"] * mask, atol=1e-5)
        elif (
            name == "trl_sampled"
        ):  # TRL's own value is the surrogate A log p, of which only the gradient has a meaning
            np.testing.assert_allclose(value.sum() / n, z["verl_agg/token-mean"], atol=1e-5)
        else:
            np.testing.assert_allclose(value, z[f"{name}/per_token"] * mask, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(value.sum() / n, z[f"{name}/loss"], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(gradient / n, z[f"{name}/grad_student_logits"], atol=1e-5, err_msg=name)
