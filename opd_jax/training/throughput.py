"""Tokens per second of each stage of a step, and how much of the chips' peak the update reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from opd_jax.config import Config
from opd_jax.losses.fused import Plan
from opd_jax.losses.vocabulary import Readout
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.flops import causal_pairs, forward_flops, peak_flops

Row = dict[str, Any]


def loss_flops(
    config: Config, student: DecoderConfig, teacher: DecoderConfig | None, tokens: float, *, metrics: bool
) -> float:
    """FLOPs of the loss, its gradient and (where measured) its metrics on ``tokens`` response tokens.

    ``teacher`` None: the cross-entropy of supervised fine-tuning.
    """
    if teacher is None:
        return 6.0 * student.vocab_size * student.width * tokens
    vocab = min(student.vocab_size, teacher.vocab_size)
    k = config.objective.k
    plan = Plan(config.objective, vocab, True, False, 0, 0, None, k if metrics else 0, Readout(), Readout())
    per_token = (
        2.0 * vocab * student.width * plan.student_vocabulary + 2 * vocab * teacher.width * plan.teacher_vocabulary
    )
    per_token += 2 * k * (2 * student.width + teacher.width) if plan.sparse else 4 * vocab * student.width
    return per_token * tokens


def update_flops(
    config: Config,
    student: DecoderConfig,
    teacher: DecoderConfig | None,
    prompts: Int[np.ndarray, "B"],
    responses: Int[np.ndarray, "B"],
    *,
    metrics: bool,
) -> float:
    """FLOPs that the update of sequences of these lengths (tokens) needs: layers forward and twice backward, and loss.

    Padding and what the backward pass recomputes are not among them.
    """
    used = prompts + responses - 1
    layers = 3 * forward_flops(student, float(used.sum()), causal_pairs(student, used))
    return layers + loss_flops(config, student, teacher, float(responses.sum()), metrics=metrics)


def throughput(
    prompts: Int[np.ndarray, "B"],
    responses: Int[np.ndarray, "B"],
    seconds: Mapping[str, float],
    flops: float,
    devices: Sequence[Any],
) -> Row:
    """``tokens_per_second`` (response tokens) of a step and of each of its stages, and ``mfu`` of its update.

    Score and update run over prompts too, so their rates count those tokens. ``mfu`` is the share of the devices'
    published bfloat16 peak; where that is not known there is none.

    Args:
        prompts, responses: tokens of every sequence of the step, on all processes.
        seconds: of each stage; of several processes, this one's.
        flops: of the update, on all devices together (``update_flops``).
    """
    made, used = float(responses.sum()), float((prompts + responses - 1).sum())
    row: Row = {"tokens_per_second": made / sum(seconds.values())}
    row |= {
        f"tokens_per_second/{stage}": (made if stage == "rollout" else used) / seconds[stage]
        for stage in ("rollout", "score", "update")
        if stage in seconds
    }
    peak = peak_flops(devices[0].device_kind)
    return row if peak is None else row | {"mfu": flops / (seconds["update"] * len(devices) * peak)}
