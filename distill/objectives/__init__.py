"""Objectives: pure functions of (student rows, teacher rows, labels) to sums.

The training loop knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from distill.config import ObjectiveConfig
from distill.kernels import Divergence
from distill.models import Rows
from distill.objectives.forward_kl import forward_kl
from distill.schedule import ramp_at

Objective = Callable[[Rows, Rows | None, Tensor], Divergence]


def weights_at(config: ObjectiveConfig, share: float) -> dict[str, float]:
    """Weight of each objective at `share` (0 to 1) of the budget."""
    return {name: ramp_at(ramp, share) for name, ramp in config.weights.items()}


def make_objective(config: ObjectiveConfig, share: float, vocab_size: int) -> Objective:
    """The weighted objective at `share` of the budget.

    Forward KL and hard labels are one pass over the logits.
    """
    weights = weights_at(config, share)

    def objective(student: Rows, teacher: Rows | None, labels_N: Tensor) -> Divergence:
        return forward_kl(
            student, teacher, labels_N, config, weights, ramp_at(config.temperature, share), vocab_size
        )

    return objective


HARD: Mapping[str, float] = {"hard": 1.0}  # the objective of every validation
