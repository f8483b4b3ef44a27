"""What every implementation of the divergence agrees on: its result and its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

IGNORED_LABEL = -100
ARGMAX_BELOW = 1e-4  # colder teachers are their arg-max; dividing by such a temperature would overflow

TemperatureOn = Literal["teacher", "both"]


class Divergence(NamedTuple):
    """Sums over the rows that count, never means: the caller divides once by the global number of rows.

    All are 0-d tensors on the device of the student logits; float32 (float64 for float64 logits) and int64.
    Only `loss` is differentiable.
    """

    loss: Tensor  # sum of kl_weight * KL(teacher || student) + hard_weight * CE(label)
    kl: Tensor  # nats, not weighted, without the T^2 factor
    soft_ce: Tensor  # nats: cross-entropy with the teacher's distribution = kl + the teacher's entropy
    hard: Tensor  # nats: cross-entropy with the labels, student at temperature 1; 0 without labels
    num_correct: Tensor  # rows whose arg-max (the first of equals) is the label; 0 without labels
    num_rows: Tensor  # rows that count


@dataclass(frozen=True)
class Terms:
    """Settings of the divergence as the kernels use them, derived once by `resolve_terms`."""

    kl_weight: float
    hard_weight: float
    teacher_temperature: float  # 0 means the teacher's arg-max
    student_temperature: float
    kl_scale: float  # T^2 or 1
    vocab_size: int  # columns from here on are padding


def resolve_terms(
    *,
    kl_weight: float,
    hard_weight: float,
    temperature: float,
    temperature_on: TemperatureOn,
    temperature_squared: bool,
    vocab_size: int,
) -> Terms:
    """Checks the numbers and settles the arg-max branch. Raises ValueError for a setting out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if temperature_on not in ("teacher", "both"):
        raise ValueError(f"temperature_on must be 'teacher' or 'both', got {temperature_on!r}")
    if temperature < ARGMAX_BELOW:
        # The student keeps temperature 1 and the factor 1: literally, its gradient would be 1e4 or 1e-8.
        return Terms(kl_weight, hard_weight, 0.0, 1.0, 1.0, vocab_size)
    student_temperature = temperature if temperature_on == "both" else 1.0
    kl_scale = temperature**2 if temperature_squared else 1.0
    return Terms(kl_weight, hard_weight, temperature, student_temperature, kl_scale, vocab_size)
