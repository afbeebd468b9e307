"""Objectives and metrics of on-policy distillation: a dense reference and a fused form that equals it."""

from opd_jax.config import Objective
from opd_jax.losses.distillation import distillation_gradient, distillation_loss, position_metrics, token_losses
from opd_jax.losses.reference import kl_estimators, position_weights, reference_loss
from opd_jax.losses.vocabulary import Readout

__all__ = [
    "Objective",
    "Readout",
    "distillation_gradient",
    "distillation_loss",
    "kl_estimators",
    "position_metrics",
    "position_weights",
    "reference_loss",
    "token_losses",
]
