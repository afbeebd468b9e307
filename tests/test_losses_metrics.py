"""Metrics against loops over positions in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import Objective, distillation_loss, kl_estimators, position_metrics

K, BINS = 4, 3


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def position(s, t, y):
    """All metrics of one position, by the definitions of paper.md; overlap_advantage is None where it has no value."""
    p, q = softmax(s), softmax(t)
    top_p, top_q = np.argsort(-s, kind="stable")[:K], np.argsort(-t, kind="stable")[:K]
    shared = [v for v in top_p if v in top_q]
    ps, qs = p[shared] / p[shared].sum(), q[shared] / q[shared].sum()
    weighted = p[top_p] / p[top_p].sum() * (np.log(q) - np.log(p))[top_p]
    extreme = top_p[np.argmax(np.abs(weighted))]
    entropy_p, entropy_q = -(p * np.log(p)).sum(), -(q * np.log(q)).sum()
    return dict(
        overlap_ratio=len(shared) / K,
        overlap_advantage=(ps * (np.log(qs) - np.log(ps))).sum() / len(shared) if shared else None,
        entropy_gap=abs(entropy_q - entropy_p),
        student_entropy=entropy_p,
        teacher_entropy=entropy_q,
        overlap_mass_student=p[shared].sum(),
        overlap_mass_teacher=q[shared].sum(),
        reverse_kl=(p * np.log(p / q)).sum(),
        forward_kl=(q * np.log(q / p)).sum(),
        kl_k1=np.log(p[y] / q[y]),
        kl_k2=0.5 * np.log(p[y] / q[y]) ** 2,
        kl_k3=q[y] / p[y] - 1 - np.log(q[y] / p[y]),
        extreme_advantage_gap=p[extreme] - q[extreme],
        argmax_agreement=float(np.argmax(s) == np.argmax(t)),
    )


def problem():
    r = np.random.default_rng(0)
    s = 2 * r.normal(size=(4, 7, 30))
    t = 0.7 * s + 1.5 * r.normal(size=s.shape)
    t[0, 0] = -s[0, 0]  # no common id
    mask = np.arange(7) < np.array([7, 3, 1, 6])[:, None]
    return s, t, r.integers(0, 30, mask.shape), mask


@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective(name="sampled"), Objective(name="topk", k=9, temperature=2.0, support="union")],
    ids=lambda o: o.name,
)
def test_metrics_equal_brute_force_in_every_mode(objective):
    s, t, y, mask = problem()
    want = {}
    for b, i in zip(*np.nonzero(mask), strict=True):
        for name, value in position(s[b, i], t[b, i], y[b, i]).items():
            sums, counts = want.setdefault(name, (np.zeros(BINS), np.zeros(BINS)))
            if value is not None:
                sums[i * BINS // 7] += value
                counts[i * BINS // 7] += 1

    def run(s, t, eye, y, mask):
        return distillation_loss(s, eye, t, eye, y, mask, objective, metric_k=K, bins=BINS, tile=5)[1]

    with jax.enable_x64(True):
        got = jax.device_get(jax.jit(run)(s, t, np.eye(30), y, mask))
    assert set(got) == {*want, *(f"{name}_by_position" for name in want)}
    for name, (sums, counts) in want.items():
        np.testing.assert_allclose(got[name], (sums.sum(), counts.sum()), atol=1e-10, err_msg=name)
        np.testing.assert_allclose(got[f"{name}_by_position"], (sums, counts), atol=1e-10, err_msg=name)
    assert 0 < got["overlap_advantage"][1] < mask.sum()


def test_lists_and_log_probabilities_of_each_side():
    s, t, y, mask = problem()
    lists = {"logp", "logq", *(f"{who}_top_{what}" for who in ("student", "teacher") for what in ("ids", "logp"))}
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (s, np.eye(30), t, np.eye(30), y, mask)]
        got = jax.device_get(position_metrics(*arrays, k=2, lists=5))
        assert set(got) - set(position_metrics(*arrays, k=2)) == lists
    for b, i in zip(*np.nonzero(mask), strict=True):
        for who, one, z in (("student", "logp", s[b, i]), ("teacher", "logq", t[b, i])):
            log, ids = np.log(softmax(z)), np.argsort(-z)[:5]
            np.testing.assert_array_equal(got[f"{who}_top_ids"][b, i], ids)
            np.testing.assert_allclose(got[f"{who}_top_logp"][b, i], log[ids], rtol=1e-10)
            np.testing.assert_allclose(got[one][b, i], log[y[b, i]], rtol=1e-10)
        p, q = np.argsort(-s[b, i])[:2], np.argsort(-t[b, i])[:2]  # the metrics are those of k = 2
        assert got["overlap_ratio"][b, i] == len(set(p) & set(q)) / 2


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    s, t, *_ = problem()
    p, q = softmax(s[1, 1]), softmax(t[1, 1])
    exact = (p * np.log(p / q)).sum()
    k1, k2, k3 = (p @ np.asarray(x, float) for x in kl_estimators(np.log(p), np.log(q)).values())
    np.testing.assert_allclose([k1, k3], exact, rtol=1e-5)
    assert abs(k2 - exact) > 0.05 * exact


def test_identical_models_agree():
    s, _, _, mask = problem()
    fixed = jnp.eye(30), jnp.asarray(s, jnp.float32), jnp.eye(30), jnp.zeros(mask.shape, int), jnp.asarray(mask)
    _, got = jax.jit(lambda h: distillation_loss(h, *fixed, Objective(), metric_k=100))(fixed[1])
    for name in ("entropy_gap", "reverse_kl", "forward_kl", "overlap_advantage", "extreme_advantage_gap"):
        assert abs(got[name][0]) < 1e-5, name
    for name in ("overlap_ratio", "argmax_agreement"):
        assert got[name][0] == got[name][1] == mask.sum(), name
