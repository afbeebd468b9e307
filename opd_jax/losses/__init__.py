"""Objectives and metrics of on-policy distillation: a dense reference and a fused form that equals it."""

from opd_jax.config import Objective
from opd_jax.losses.fused import distillation_loss, position_metrics, token_losses
from opd_jax.losses.reference import reference_loss

__all__ = ["Objective", "distillation_loss", "position_metrics", "reference_loss", "token_losses"]
