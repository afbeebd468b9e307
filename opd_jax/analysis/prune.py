"""Which layers of a model matter least: a student made from its own teacher by leaving them out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.config import Data, Objective
from opd_jax.config_files import parse_data
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.errors import InputError
from opd_jax.losses import distillation_loss
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.models.hf import load_model
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import pack
from opd_jax.sampling.scheduler import make_rollout
from opd_jax.sampling.states import hidden_states
from opd_jax.tracking.console import console
from opd_jax.types import Params, Sequences

PROMPTS, RESPONSE = 8, 48  # enough to rank layers: their divergences differ by factors


def layers_to_drop(source: str, drop_layers: str | None, prompts: str | None) -> tuple[int, ...]:
    """Reads ``--drop-layers``: None, indices (``4,5,25,26``), or ``auto:N`` for the N that matter least on ``prompts``.

    Raises:
        InputError: neither form, or auto without a Hugging Face directory and prompts.
    """
    if drop_layers is None:
        return ()
    if match := re.fullmatch(r"auto:(\d+)", drop_layers):
        if not Path(source).is_dir() or prompts is None:
            raise InputError(
                f"--drop-layers {drop_layers}: needs a Hugging Face directory as source (found {source}) and --prompts "
                "SOURCE. Import the whole model first, then import that directory."
            )
        return tuple(least_important_layers(source, parse_data(prompts), int(match[1])))
    if not re.fullmatch(r"\d+(,\d+)*", drop_layers):
        raise InputError(f"--drop-layers {drop_layers}: expected indices as 4,5,25,26, or auto:N")
    return tuple(map(int, drop_layers.split(",")))


def least_important_layers(model: str | Path, data: Data, count: int) -> list[int]:
    """``count`` layers, chosen one after the other, each the one whose removal costs the least.

    The cost is KL(pruned ‖ whole) in nats per token, over the vocabulary, on rollouts of the whole model: its first
    ``PROMPTS`` prompts of ``data``, ``RESPONSE`` tokens, temperature 1, seed 0.

    Raises:
        InputError: the model or the prompts cannot be read, or ``count`` leaves no layer.
    """
    params, config = load_model(model)
    if not 0 < count < config.layers:
        raise InputError(
            f"--drop-layers auto:{count}: {model} has {config.layers} layers; drop 1 … {config.layers - 1}"
        )
    tokenizer = load_tokenizer(model)
    vocab_size = valid_vocab_size(tokenizer)
    encoded, _, _ = encode_prompts(load_records(data), tokenizer, data)
    encoded = encoded[:PROMPTS]
    prompts = stack_prompts(encoded, range(len(encoded)), max(map(len, encoded)))
    dtype = jnp.bfloat16
    engine = make_engine(config, stop_ids=stop_ids(model, tokenizer), vocab_size=vocab_size, dtype=dtype)
    rollouts = make_rollout(engine, max_response=RESPONSE)(engine.cast(params), prompts, Law(), 0, 0)
    rows = pack(rollouts)
    rows = jax.tree.map(lambda x: x[rows.segments.any(axis=1)], rows)
    whole = jax.jit(lambda p: hidden_states(p, config, rows, dtype=dtype))(params)

    kept = list(range(config.layers))
    with console.progress(sum(config.layers - i for i in range(count)), "scoring layers", unit="candidate") as bar:
        for _ in range(count):
            cost = _make_cost(config, len(kept) - 1, rows, whole, vocab_size, dtype)
            costs = {}
            for layer in kept:
                rest = np.asarray([i for i in kept if i != layer])
                costs[layer] = float(cost(params, rest))
                bar.advance({"loss": costs[layer]})
            best = min(costs, key=costs.__getitem__)
            kept.remove(best)
            console.print(
                f"  without {sorted(set(range(config.layers)) - set(kept))}: {costs[best]:.3f} nats per token"
            )
    return sorted(set(range(config.layers)) - set(kept))


def _make_cost(
    config: DecoderConfig, layers: int, rows: Sequences, whole: jax.Array, vocab_size: int, dtype: Any
) -> Any:
    """One compilation per number of layers; which ones is traced."""
    windows = config.layer_windows
    if len(set(windows)) > 1:
        raise InputError("--drop-layers auto: layers with different sliding windows are not supported; name the layers")
    smaller = dataclasses.replace(config, layers=layers, windows=config.windows and config.windows[:layers])

    def cost(params: Params, keep: jax.Array) -> jax.Array:
        pruned = params | {"layers": jax.tree.map(lambda w: w[keep], params["layers"])}
        hidden = hidden_states(pruned, smaller, rows, dtype=dtype)
        (loss, n), _ = distillation_loss(
            hidden, head(params), whole, head(params), rows.targets, rows.mask, Objective(),
            vocab_size=vocab_size, metrics=False,
        )  # fmt: skip
        return loss / n

    return jax.jit(cost)
