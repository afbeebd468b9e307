"""AdamW with a learning-rate schedule and a global gradient clip, by optax."""

from __future__ import annotations

import jax
import optax

from opd_jax.config import Optimizer
from opd_jax.types import Params


def make_schedule(settings: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up from lr / warmup, then constant, or cosine or linear decay, 0 after the last step.

    ``wsd`` (warm-up, stable, decay) stays constant until the last ``settings.decay`` steps, which fall linearly to 0.
    """
    rest = max(steps - settings.warmup, 1)
    falling = min(settings.decay, rest)
    after = {
        "constant": optax.constant_schedule(settings.lr),
        "cosine": optax.cosine_decay_schedule(settings.lr, rest),
        "linear": optax.linear_schedule(settings.lr, 0.0, rest),
        "wsd": optax.linear_schedule(settings.lr, 0.0, max(falling, 1), transition_begin=rest - falling),
    }[settings.schedule]
    if not settings.warmup:
        return after
    rise = optax.linear_schedule(settings.lr / settings.warmup, settings.lr, max(settings.warmup - 1, 1))
    return optax.join_schedules([rise, after], [settings.warmup])


def make_optimizer(settings: Optimizer, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clip by global norm, then AdamW (norms and biases are not decayed); and its learning rate by step."""
    schedule = make_schedule(settings, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            schedule,
            b1=settings.b1,
            b2=settings.b2,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            mask=_decayed,
            mu_dtype=settings.moment_dtype,
        ),
    )
    return optimizer, schedule


def _decayed(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, _: not str(path[-1].key).endswith(("norm", "bias")), params)
