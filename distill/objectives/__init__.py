"""Objectives: pure functions of (student rows, teacher rows, labels) to sums.

The training loop knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from distill.config import ObjectiveConfig
from distill.kernels import Divergence, SparseTargets
from distill.models import Rows
from distill.objectives.soft_labels import soft_and_hard_labels
from distill.schedule import ramp_at

Objective = Callable[[Rows, Rows | SparseTargets | None, Tensor], Divergence]


def weights_at(config: ObjectiveConfig, share: float) -> dict[str, float]:
    """Weight of each objective at `share` (0 to 1) of the budget."""
    return {name: ramp_at(ramp, share) for name, ramp in config.weights.items()}


def make_objective(config: ObjectiveConfig, share: float, vocab_size: int) -> Objective:
    """The weighted objective at `share` of the budget."""
    return partial(
        soft_and_hard_labels,
        config=config,
        weights=weights_at(config, share),
        temperature=ramp_at(config.temperature, share),
        vocab_size=vocab_size,
    )


def hard_labels(config: ObjectiveConfig, vocab_size: int) -> Objective:
    """The objective of every validation, computed as `config` says, whatever it trains on."""
    return make_objective(replace(config, weights={"hard": 1.0}, temperature=1.0), 0.0, vocab_size)
