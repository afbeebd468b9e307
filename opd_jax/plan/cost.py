"""FLOPs, bytes and an estimated time of each stage of a step, counted from shapes.

The compiler's ``cost_analysis`` counts the body of a loop once, so the numbers here are formulas (a multiply-add is 2).
All are of one chip, with the work spread evenly.
"""

from __future__ import annotations

import dataclasses
import math

from opd_jax.config import Config
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.flops import forward_flops, weight_count
from opd_jax.plan.topology import Chip
from opd_jax.sampling.decode import SEGMENT, bucket
from opd_jax.training.throughput import loss_flops

# Shares of the published peaks that the estimate counts on.
COMPUTE, MEMORY, LINKS = 0.4, 0.7, 0.7
ASSUMPTIONS = (
    f"{COMPUTE:.0%} of the chip's bfloat16 peak in products, {MEMORY:.0%} of its memory bandwidth, {LINKS:.0%} of one "
    "ring of links; compute, memory and links overlap, so the slowest counts, except in decoding, where they add up",
    "every response has the mean length and every prompt its maximum; prompts wait wherever slots are free",
    "weights are gathered and gradients summed once per pass of micro_batch rows; packing fills rows to 90 %",
    "attention does the causal half of T² products; host, checkpoints, verification and evaluation take nothing",
)
PACKED = 0.9


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one stage of a step, one chip. ``links``: bytes that arrive over them; ``serial``: nothing overlaps."""

    name: str
    flops: float
    memory: float
    links: float
    serial: bool = False

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each resource is busy."""
        return {
            "compute": self.flops / (COMPUTE * chip.flops),
            "memory bandwidth": self.memory / (MEMORY * chip.memory),
            "interconnect": self.links / (LINKS * chip.link),
        }

    def estimate(self, chip: Chip) -> tuple[float, str]:
        """Estimated seconds, and what bounds them."""
        parts = self.seconds(chip)
        bound = max(parts, key=lambda k: parts[k])
        return (sum(parts.values()) if self.serial else parts[bound]), bound


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the cost depends on beside the models: mesh axes, rows a pass, mean response length."""

    data: int
    fsdp: int
    tensor: int
    micro_batch: int
    mean_response: float

    @property
    def chips(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def shards(self) -> int:
        return self.data * self.fsdp


def step_costs(config: Config, student: DecoderConfig, teacher: DecoderConfig | None, sizes: Sizes) -> list[Cost]:
    """The stages of one training step."""
    rows = config.rollout.prompts * config.rollout.samples
    prompt, mean = config.data.max_prompt, sizes.mean_response
    if config.kind == "sft":
        return [_update(config, student, None, sizes, rows, prompt + mean)]
    slots = min(config.rollout.slots or rows, rows)
    width = 2 if config.dtype == "bfloat16" else 4
    weights = width * sum(weight_count(student).values())
    received = weights / sizes.tensor * (1 - 1 / sizes.fsdp)
    share = weights / sizes.tensor
    prefilled = config.rollout.prompts * prompt
    return [
        Cost("weights for the rollout", 0, 2 * share + 2 * weights / sizes.fsdp / sizes.tensor, received),
        Cost(
            "prefill",
            forward_flops(student, prefilled, prefilled * prompt / 2) / sizes.chips,
            share + _activations(student, prefilled, sizes, width),
            _tensor_sums(student, prefilled, sizes, 1, width),
        ),
        _decode(config, student, sizes, rows, slots, width),
        *([_score(config, teacher, sizes, rows, prompt + mean, width)] if teacher else []),
        _update(config, student, teacher, sizes, rows, prompt + mean),
    ]


def _decode(config: Config, c: DecoderConfig, sizes: Sizes, rows: int, slots: int, width: int) -> Cost:
    prompt, mean, limit = config.data.max_prompt, sizes.mean_response, config.rollout.max_response
    steps = mean * rows / slots
    if slots < rows:  # refilled: the cache stays as wide as the longest that is going on
        columns = bucket(round(prompt + mean))
    else:
        starts = range(0, max(round(mean), 1), SEGMENT)
        columns = sum(bucket(prompt + at + SEGMENT) for at in starts) / len(starts)
    columns = min(columns, prompt + limit + SEGMENT)
    mine = slots / sizes.shards
    cache = mine * columns * 2 * c.layers * c.kv_heads * c.head_dim * width / min(sizes.tensor, c.kv_heads)
    counts = weight_count(c)
    head = c.vocab_size * c.width
    read = width * (counts["layers"] + head) / sizes.tensor
    flops = forward_flops(c, 1, columns) + 2 * head
    sums = _tensor_sums(c, slots, sizes, 1, width)
    return Cost("rollout", steps * slots * flops / sizes.chips, steps * (read + cache), steps * sums, serial=True)


def _score(config: Config, c: DecoderConfig, sizes: Sizes, rows: int, length: float, width: int) -> Cost:
    tokens, passes = rows * length, _passes(config, rows, length, sizes)
    weights = width * weight_count(c)["layers"] / sizes.tensor
    return Cost(
        "teacher scoring",
        forward_flops(c, tokens, tokens * length / 2) / sizes.chips,
        passes * 2 * weights + _activations(c, tokens, sizes, width),
        passes * weights * (1 - 1 / sizes.fsdp) + _tensor_sums(c, tokens, sizes, 1, width),
    )


def _update(
    config: Config, c: DecoderConfig, teacher: DecoderConfig | None, sizes: Sizes, rows: int, length: float
) -> Cost:
    width = 2 if config.dtype == "bfloat16" else 4
    tokens, passes = rows * length, _passes(config, rows, length, sizes)
    recomputed = {"none": 0.0, "dots": 0.1, "full": 1.0, "offload": 1.0}[config.remat]
    flops = (3 + recomputed) * forward_flops(c, tokens, tokens * length / 2)
    answers = rows * sizes.mean_response
    measured = 1 / config.metrics_every
    flops += measured * loss_flops(config, c, teacher, answers, metrics=True)
    flops += (1 - measured) * loss_flops(config, c, teacher, answers, metrics=False)
    counts = weight_count(c)
    weights, everything = counts["layers"] / sizes.tensor, sum(counts.values()) / sizes.tensor / sizes.fsdp
    # twice gathered (forward, backward), gradients in float32 summed over fsdp and, with replicas, over data
    gathered = passes * (2 * width + 4) * weights * (1 - 1 / sizes.fsdp)
    replicas = passes * 2 * 4 * weights / sizes.fsdp * (1 - 1 / sizes.data)
    return Cost(
        "update",
        flops / sizes.chips,
        passes * 4 * width * weights + (3 + recomputed) * _activations(c, tokens, sizes, width) + 4 * 8 * everything,
        gathered + replicas + _tensor_sums(c, tokens, sizes, 2 + recomputed, width),
    )


def _passes(config: Config, rows: int, length: float, sizes: Sizes) -> float:
    """Passes of ``micro_batch`` rows; packed, only as many rows as the tokens fill."""
    if not config.pack:
        return rows / sizes.micro_batch
    width = config.data.max_prompt + config.rollout.max_response
    return math.ceil(min(rows * length / PACKED / width, rows) / sizes.micro_batch)


def _activations(c: DecoderConfig, tokens: float, sizes: Sizes, width: int) -> float:
    """Bytes that one forward pass reads and writes between its products."""
    per_token = 8 * c.width + (3 * c.hidden + 4 * c.heads * c.head_dim) / sizes.tensor
    return c.layers * per_token * width * tokens / sizes.shards


def _tensor_sums(c: DecoderConfig, tokens: float, sizes: Sizes, times: float, width: int) -> float:
    """Bytes that a chip receives to sum activations over the tensor axis, twice a layer."""
    each = 2 * width * c.width * tokens / sizes.shards * (1 - 1 / sizes.tensor)
    return times * 2 * c.layers * each
