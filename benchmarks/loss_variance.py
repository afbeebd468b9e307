"""Bias and variance of every objective's gradient against the full reverse KL's, on a real student and teacher.

    python benchmarks/loss_variance.py --student models/smollm2-26 --teacher models/smollm2 \\
        --prompts gsm8k_test.jsonl --out docs/losses-variance

At each token of fresh student rollouts the gradient in the student's logits is taken of the objectives as the library
defines them (``reference_token_loss``, differentiated by JAX), and of ``sampled`` its expectation and variance over
y ~ p by summing over the vocabulary: nothing here is estimated by drawing y. Ratios of sums over tokens, with 95 %
intervals from a bootstrap over sequences. The same for the head's gradient (outer products of logit gradient and hidden
state), averaged over tokens: there the state visited is random too. Prints tables, writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from opd_jax.config import Objective
from opd_jax.config_files import parse_data
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.losses.reference import reference_token_loss
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.models.hf import load_model
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import pack
from opd_jax.sampling.scheduler import make_rollout
from opd_jax.sampling.states import hidden_states
from opd_jax.tracking.run_dir import describe_environment
from opd_jax.types import Params

SIZES = (1, 4, 16, 64, 256)
COLOURS = {"topk": "#0072b2", "topk_reference": "#d55e00", "tail": "#009e73", "unnormalised": "#cc79a7"}
LABELS = {
    "topk": "topk (Eq. 5)",
    "topk_reference": "topk_reference",
    "tail": "topk, tail bucket",
    "unnormalised": "topk, normalise=false",
}
MARKERS = {"topk": "o", "topk_reference": "s", "tail": "^", "unnormalised": "x"}
BOOTSTRAP = 2000
LENGTH, STRIDE = 48, 4  # neighbouring tokens tell little more than one of them
CHUNK = 16  # tokens whose logits are differentiated at once


class States(NamedTuple):
    """What the student's tokens were predicted from, flattened over sequences."""

    student: np.ndarray  # [n, V] logits
    teacher: np.ndarray  # [n, V] logits
    hidden: np.ndarray  # [n, D] the student's
    sequence: np.ndarray  # [n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--teacher", required=True, metavar="DIR")
    parser.add_argument("--prompts", required=True, metavar="SOURCE")
    parser.add_argument("--sequences", type=int, default=64, help="one a prompt")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    states = visit(options.student, options.teacher, options.prompts, options.sequences)
    result = measure(states)
    result["setup"] = {
        "student": Path(options.student).name,
        "teacher": Path(options.teacher).name,
        "prompts": f"{Path(options.prompts).name}, the first {options.sequences} of at most 80 tokens",
        "rollouts": f"seed 0, temperature 1, at most {LENGTH} tokens, every {STRIDE}th of them measured, float32",
        "sequences": int(states.sequence.max()) + 1,
        "tokens": len(states.sequence),
        "vocabulary": states.student.shape[1],
        "bootstrap": BOOTSTRAP,
    }
    environment = describe_environment()
    result["environment"] = {n: environment[n] for n in ("python", "packages", "cpu", "devices")}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))
    figure(result).savefig(options.out.with_suffix(".png"), dpi=150)


def visit(student: str, teacher: str, source: str, sequences: int) -> States:
    """Rollouts of the student, and both models' logits at every ``STRIDE``-th of their tokens."""
    data = parse_data(source, ["max_prompt=80", "limit=1000"])
    tokenizer = load_tokenizer(student)
    vocab = valid_vocab_size(tokenizer)
    encoded = encode_prompts(load_records(data), tokenizer, data)[0][:sequences]
    prompts = stack_prompts(encoded, range(len(encoded)), max(map(len, encoded)))
    params, config = load_model(student)
    engine = make_engine(config, stop_ids=stop_ids(student, tokenizer), vocab_size=vocab)
    rollouts = make_rollout(engine, max_response=LENGTH)(engine.cast(params), prompts, Law(), 0, 0)
    rows = pack(rollouts, separate=True)
    chosen = rows.mask & ((rows.depth + np.arange(len(encoded))[:, None]) % STRIDE == 0)

    def readout(params: Params, config: DecoderConfig) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.asarray(jax.jit(lambda p: hidden_states(p, config, rows))(params))[chosen]
        return hidden, hidden @ np.asarray(head(params))[:vocab].T

    hidden, z = readout(params, config)
    return States(z, readout(*load_model(teacher))[1], hidden, np.nonzero(chosen)[0])


def measure(states: States) -> dict[str, Any]:
    """Every objective against the full reverse KL, in the logits and in the head."""
    z, t, hidden, sequence = states
    n = int(sequence.max()) + 1
    of_sequence = np.eye(n, dtype=np.float32)[sequence]
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP)
    counts = of_sequence.sum(0)
    overlap_hh = hidden @ hidden.T
    hidden_norm = np.einsum("td,td->t", hidden, hidden)

    def per_sequence(x_t: np.ndarray) -> np.ndarray:
        return of_sequence.T @ x_t

    def across(g_tV: np.ndarray) -> np.ndarray:
        """[n, n] sums over the tokens of two sequences of ⟨dW_t, dW_s⟩, dW_t = g_t ⊗ h_t the head's gradient."""
        return of_sequence.T @ ((g_tV @ g_tV.T) * overlap_hh) @ of_sequence

    def squared_mean(pairs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """‖E dW‖² from pairs of different sequences alone, so that noise adds no norm."""
        off = pairs * (1 - np.eye(n))
        tokens = np.outer(counts, counts) * (1 - np.eye(n))
        return lambda c: np.einsum("ri,ij,rj->r", c, off, c) / np.einsum("ri,ij,rj->r", c, tokens, c)

    full = gradients(Objective(), z, t)
    norm = per_sequence((full**2).sum(1))
    variance_t = sampled_variance(z, t, full)
    signal = squared_mean(across(full))
    mean = lambda x: lambda c: (c @ x) / (c @ counts)  # noqa: E731
    draw_noise, norm_h = (
        mean(per_sequence(variance_t * hidden_norm)),
        mean(per_sequence((full**2).sum(1) * hidden_norm)),
    )
    variance = per_sequence(variance_t)
    result: dict[str, Any] = {
        "sampled": {
            "noise": interval(lambda c: np.sqrt((c @ variance) / (c @ norm)), draws),
            "head_noise": interval(lambda c: np.sqrt(draw_noise(c) / signal(c)), draws),
            "token_factor": interval(lambda c: 1 + draw_noise(c) / (norm_h(c) - signal(c)), draws),
        },
        "full": {"head_noise": interval(lambda c: np.sqrt((norm_h(c) - signal(c)) / signal(c)), draws)},
        "objectives": [],
    }
    check_closed_forms(z[:8, :4096], t[:8, :4096])
    outside = {k: mass_outside(z, t, k) for k in SIZES}
    for name, objective in objectives():
        g = gradients(objective, z, t)
        cosine = (per_sequence((g * full).sum(1)), per_sequence((g**2).sum(1)))
        g -= full
        bias, head_bias = per_sequence((g**2).sum(1)), squared_mean(across(g))
        row: dict[str, Any] = {
            "objective": name, "k": objective.k, "support": objective.support,
            "bias": interval(lambda c, b=bias: np.sqrt((c @ b) / (c @ norm)), draws),
            "cosine": interval(lambda c, p=cosine: (c @ p[0]) / np.sqrt((c @ p[1]) * (c @ norm)), draws)
            if cosine[1].any() else None,
            "head_bias": interval(lambda c, f=head_bias: np.sqrt(np.maximum(f(c), 0) / signal(c)), draws),
            "draws_to_match": interval(lambda c, b=bias: (c @ variance) / (c @ b), draws),
            "tokens_to_match": interval(lambda c, f=head_bias: draw_noise(c) / np.maximum(f(c), 1e-30), draws),
        }  # fmt: skip
        if objective.support == "student":
            row["mass_outside_student"], row["mass_outside_teacher"] = outside[objective.k]
        result["objectives"].append(row)
    return result


def objectives() -> list[tuple[str, Objective]]:
    forms = {
        "topk": {"name": "topk"},
        "topk_reference": {"name": "topk_reference"},
        "tail": {"name": "topk", "tail": True},
        "unnormalised": {"name": "topk", "normalise": False},
    }
    out = [(name, Objective(k=k, **form)) for name, form in forms.items() for k in SIZES]
    others = ("teacher", "overlap", "non_overlap", "union")
    return out + [(name, Objective(k=16, support=s, **forms[name])) for name in ("topk", "tail") for s in others]


def gradients(objective: Objective, z: np.ndarray, t: np.ndarray) -> np.ndarray:
    """[n, V] dloss/dz of each token, by automatic differentiation of the dense reference."""

    @jax.jit
    def gradient(z_CV: Array, t_CV: Array) -> Array:
        unused = jnp.zeros(z_CV.shape[0], jnp.int32)
        return jax.grad(lambda z_CV: reference_token_loss(z_CV, t_CV, unused, objective).sum())(z_CV)

    rows = -len(z) % CHUNK  # repeated, so that one shape is compiled
    z, t = (np.pad(x, ((0, rows), (0, 0)), "edge") for x in (z, t))
    parts = [np.asarray(gradient(z[i : i + CHUNK], t[i : i + CHUNK])) for i in range(0, len(z), CHUNK)]
    return np.concatenate(parts)[: len(parts) * CHUNK - rows]


def sampled_variance(z: np.ndarray, t: np.ndarray, full: np.ndarray) -> np.ndarray:
    """E‖g − E g‖² over y ~ p of g = a_y (e_y − p), a = log p/q: Σ_y p_y a_y² (1 − 2 p_y + ‖p‖²) − ‖E g‖²."""

    @jax.jit
    def second_moment(z_V: Array, t_V: Array) -> Array:
        logp, logq = jax.nn.log_softmax(z_V), jax.nn.log_softmax(t_V)
        p = jnp.exp(logp)
        return jnp.sum(p * (logp - logq) ** 2 * (1 - 2 * p + jnp.sum(p**2)))

    return np.asarray([second_moment(*row) for row in zip(z, t, strict=True)]) - (full**2).sum(1)


def check_closed_forms(z: np.ndarray, t: np.ndarray) -> None:
    """At k = |V| every top-k form is the full reverse KL, and so is the mean of the sampled gradient over y ~ p."""
    full = gradients(Objective(), z, t)
    for name, objective in objectives():
        if objective.support == "student" and objective.k == 1:
            g = gradients(objective.model_copy(update={"k": z.shape[1]}), z, t)
            assert np.linalg.norm(g - full) <= 1e-5 * np.linalg.norm(full), name
    logp, logq = (np.asarray(jax.nn.log_softmax(x.astype(np.float64))) for x in (z, t))
    cost = np.exp(logp) * (logp - logq)
    mean = cost - np.exp(logp) * cost.sum(-1, keepdims=True)
    assert np.linalg.norm(mean - full) <= 1e-5 * np.linalg.norm(full)


def mass_outside(z: np.ndarray, t: np.ndarray, k: int) -> tuple[float, float]:
    """Mean probability of either model outside of the student's top k."""
    ids = np.argpartition(-z, k - 1, axis=1)[:, :k]
    rest = [1 - np.take_along_axis(np.asarray(jax.nn.softmax(x)), ids, 1).sum(1).mean() for x in (z, t)]
    return float(rest[0]), float(rest[1])


def interval(statistic: Callable[[np.ndarray], np.ndarray], draws: np.ndarray) -> list[float]:
    """Value, and the 95 % percentile interval over resampled sequences."""
    value = statistic(np.ones((1, draws.shape[1])))[0]
    return [float(value), *np.quantile(statistic(draws.astype(float)), [0.025, 0.975]).tolist()]


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/losses.md."""

    def cell(x: list[float] | None, digits: int = 3) -> str:
        return "–" if x is None else f"{x[0]:,.{digits}f} ({x[1]:,.{digits}f}–{x[2]:,.{digits}f})"

    lines = [f"{n} {k}: {cell(v)}" for n in ("sampled", "full") for k, v in result[n].items()]
    lines += [
        "",
        "| objective | support | k | bias | cosine | bias, head | draws | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["objectives"]:
        cells = [cell(r["bias"]), cell(r["cosine"]), cell(r["head_bias"])]
        cells += [cell(r[n], 0) for n in ("draws_to_match", "tokens_to_match")]
        lines.append(f"| {r['objective']} | {r['support']} | {r['k']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Figure:
    """Left: bias against k at one state. Right: error of the mean head gradient against the tokens averaged."""
    fig = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    rows = [r for r in result["objectives"] if r["support"] == "student"]
    for name, colour in COLOURS.items():
        chosen = [r for r in rows if r["objective"] == name]
        k = [r["k"] for r in chosen]
        value, low, high = np.asarray([r["bias"] for r in chosen]).T
        left.errorbar(
            k, value, [value - low, high - value], color=colour, marker=MARKERS[name], capsize=2, label=LABELS[name]
        )
    left.axhline(result["sampled"]["noise"][0], color="#555555", linestyle="--", label="sampled: noise of one draw")
    left.set(xscale="log", yscale="log", xlabel="k", xticks=SIZES, xticklabels=SIZES)
    heights = (0.1, 0.2, 0.5, 1, 2, 5)
    left.set(yticks=heights, yticklabels=heights)
    left.minorticks_off()
    left.set_title("bias in the logits of one state / norm of full", fontsize=10, loc="left")
    left.legend(frameon=False, fontsize=8)

    tokens = np.asarray([1e2, 2e7])
    noise = {n: result[n]["head_noise"][0] for n in ("sampled", "full")}
    right.plot(
        tokens,
        noise["sampled"] / np.sqrt(tokens),
        color="#555555",
        linestyle="--",
        label="sampled: noise of the drawn tokens",
    )
    right.plot(tokens, noise["full"] / np.sqrt(tokens), color="#000000", label="full: noise of the visited states")
    for r in rows:
        if r["objective"] == "topk" and r["k"] > 1:  # at k = 1 the gradient is 0
            x, y = r["tokens_to_match"][0], r["head_bias"][0]
            right.axhline(
                y,
                color=COLOURS["topk"],
                linewidth=1,
                label="topk (Eq. 5): bias, any number of tokens" if r["k"] == 4 else None,
            )
            right.plot(x, y, color=COLOURS["topk"], marker="o", markersize=5)
            text = f"k = {r['k']}: {float(f'{x:.2g}'):,.0f} tokens"
            right.annotate(text, (x, y), (5, 3), textcoords="offset points", color=COLOURS["topk"], fontsize=8)
    right.set(xscale="log", yscale="log", xlabel="tokens averaged", xlim=tokens, ylim=(0.02, 12))
    right.set(yticks=(0.1, 1, 10), yticklabels=("0.1", "1", "10"))
    right.set_title("error of the mean gradient of the head / norm of full's", fontsize=10, loc="left")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


if __name__ == "__main__":
    main()
