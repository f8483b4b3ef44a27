"""What every implementation of the divergences agrees on: its result, its settings, the sparse targets."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distill.targets.sparse import SparseTargets

IGNORED_LABEL = -100
ARGMAX_BELOW = 1e-4  # colder teachers are their arg-max; dividing by such a temperature would overflow
GOLD_ROUNDING = 1e-3  # of probabilities that were stored in few bits

Kind = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")
TemperatureOn = Literal["teacher", "both"]


class Divergence(NamedTuple):
    """Sums over the rows that count, never means: the caller divides once by the global number of rows.

    All are 0-d tensors on the device of the student logits; float32 (float64 for float64 logits) and int64.
    Only `loss` is differentiable, and only `loss` knows weights.
    """

    loss: Tensor  # sum over rows of row weight * (soft_weight * divergence + hard_weight * CE(label))
    soft: Tensor  # nats: the divergence from the teacher, without weights and the T^2 factor
    soft_ce: Tensor  # nats: cross-entropy with the teacher's distribution; forward KL + the teacher's entropy
    hard: Tensor  # nats: cross-entropy with the labels, student at temperature 1; 0 without labels
    num_correct: Tensor  # rows whose arg-max (the first of equals) is the label; 0 without labels
    num_rows: Tensor  # rows that count


@dataclass(frozen=True)
class Terms:
    """Settings of a divergence as the kernels use them, derived once by `resolve_terms`."""

    kind: Kind
    beta: float  # of jsd alone, strictly between 0 and 1
    soft_weight: float
    hard_weight: float
    teacher_temperature: float  # 0 means the teacher's arg-max
    student_temperature: float
    soft_scale: float  # T^2 or 1
    vocab_size: int  # columns from here on are padding

    @property
    def soft_factor(self) -> float:
        """What the divergence is multiplied by in the loss."""
        return self.soft_weight * self.soft_scale


def resolve_terms(
    *,
    kind: str,
    beta: float,
    soft_weight: float,
    hard_weight: float,
    temperature: float,
    temperature_on: str,
    temperature_squared: bool,
    vocab_size: int,
) -> Terms:
    """Checks the settings, settles the arg-max branch and the ends of beta. Raises ValueError for a bad one."""
    kind = _resolve_kind(kind, beta)
    for name, weight in (("soft_weight", soft_weight), ("hard_weight", hard_weight)):
        if not math.isfinite(weight):
            raise ValueError(f"{name} must be a finite number, got {weight}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if temperature_on not in ("teacher", "both"):
        raise ValueError(f"temperature_on must be 'teacher' or 'both', got {temperature_on!r}")
    teacher_temperature = temperature if temperature >= ARGMAX_BELOW else 0.0
    if kind == "reverse_kl" and teacher_temperature == 0:
        raise ValueError(
            f"temperature {temperature} makes the teacher its arg-max, from which the reverse KL is infinite: "
            f"use {ARGMAX_BELOW} or more, or another kind"
        )
    # Below the threshold the student keeps temperature 1 and the factor 1: literally, its gradient would be
    # 1e4 or 1e-8.
    student_temperature = teacher_temperature if temperature_on == "both" and teacher_temperature else 1.0
    soft_scale = temperature**2 if temperature_squared and teacher_temperature else 1.0
    return Terms(
        kind,  # type: ignore[arg-type]  # checked above
        beta,
        soft_weight,
        hard_weight,
        teacher_temperature,
        student_temperature,
        soft_scale,
        vocab_size,
    )


def _resolve_kind(kind: str, beta: float) -> str:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}{hint}")
    if not 0 <= beta <= 1:  # also refuses NaN
        raise ValueError(f"beta must be in 0..1, got {beta}")
    # At its ends the mixture is one of the two and the JSD is 0 for every student; divided by beta or 1 - beta
    # it tends to the KL divergences, which is what the field means by them (Agarwal et al., ICLR 2024).
    if kind == "jsd" and beta in (0, 1):
        return "forward_kl" if beta == 0 else "reverse_kl"
    return kind


def gold_as_entry(targets: SparseTargets, labels_N: Tensor | None) -> SparseTargets:
    """The same targets with the gold probability as entry K + 1, taken out of the tail; gold_N is None after."""
    if targets.gold_N is None:
        return targets
    if labels_N is None:
        raise ValueError("targets.gold_N is the label's probability, but there are no labels: give labels_N")
    label_N = labels_N.clamp(min=0)
    is_known_N = ((targets.ids_NK == label_N[:, None]) & (targets.probs_NK > 0)).any(1)
    extra_N = targets.gold_N.masked_fill(is_known_N | (labels_N == IGNORED_LABEL), 0.0)
    _check_gold(extra_N, targets.tail_N)
    tail_N = None if targets.tail_N is None else (targets.tail_N - extra_N).clamp(min=0.0)
    return SparseTargets(
        torch.cat([targets.ids_NK, label_N[:, None]], 1),
        torch.cat([targets.probs_NK, extra_N[:, None]], 1),
        tail_N,
    )


def _check_gold(extra_N: Tensor, tail_N: Tensor | None) -> None:
    """On CPU, where looking costs no wait: what is taken out of the tail was in it."""
    if tail_N is None or tail_N.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (wrong_N := extra_N > tail_N + GOLD_ROUNDING).any():
        row = int(wrong_N.nonzero()[0])
        raise ValueError(
            f"targets.gold_N of row {row} is {float(extra_N[row]):.4g}, more than the tail_N of {float(tail_N[row]):.4g} "
            "that holds it: the label is no kept class there, so its probability is part of the tail"
        )
