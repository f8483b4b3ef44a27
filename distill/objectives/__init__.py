"""Objectives: pure functions of what student and teacher say of the counted rows, to sums over these rows.

The first term is a divergence from the teacher and the labels in one fused pass (`soft_labels`); `terms.TERMS` holds
all others. The training loop knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.config import FUSED, ObjectiveConfig
from distill.head import Pooled
from distill.kernels import Divergence, SparseTargets
from distill.models import Rows
from distill.objectives.seen import Seen
from distill.objectives.soft_labels import soft_and_hard_labels
from distill.objectives.terms import TERMS, needs_of
from distill.schedule import ramp_at


class Sums(NamedTuple):
    """A Divergence, whose `loss` has all terms in it, and each other term by itself, unweighted, as `terms_K`."""

    loss: Tensor
    soft: Tensor
    soft_ce: Tensor
    hard: Tensor
    num_correct: Tensor
    num_rows: Tensor
    terms_K: Tensor


@dataclass(frozen=True)
class Objective:
    """The weighted objective at `share` of the budget.

    bucket_V: see Seen; only terms that count words read it.
    """

    config: ObjectiveConfig
    vocab_size: int
    share: float = 0.0
    bucket_V: Tensor | None = None
    needs: frozenset[str] = field(init=False)  # of both models' inside

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", needs_of(self.config.weights))

    def at(self, share: float) -> Objective:
        return replace(self, share=share)

    def __call__(
        self,
        student: Rows,
        teacher: Rows | Pooled | SparseTargets | None,
        labels_N: Tensor,
        sequence_N: Tensor | None = None,
        learned: Mapping[str, nn.Module] | None = None,
    ) -> Divergence | Sums:
        """Sums over the N rows that count, never means. Arguments as in `Seen`."""
        weights = weights_at(self.config, self.share)
        fused = self._fused(student, teacher, labels_N, weights)
        names = term_names(self.config)
        if not names:
            return fused
        sequence_N = torch.zeros_like(labels_N) if sequence_N is None else sequence_N
        seen = Seen(
            student, teacher, labels_N, sequence_N, self.vocab_size, self.config.chunk_rows, self.share,
            self.bucket_V, learned or {},
        )  # fmt: skip
        loss, sums = fused.loss, []
        for name in names:
            # A weight of 0 switches a term off, even where it is infinite; what it would be is logged.
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights[name] != 0):
                sums.append(TERMS[name].function(seen, **self.config.settings.get(name, {})))
            loss = loss + weights[name] * sums[-1] if weights[name] else loss
        return Sums(loss, *fused[1:], torch.stack([each.detach().double() for each in sums]))

    def _fused(self, student: Rows, teacher: Any, labels_N: Tensor, weights: dict[str, float]) -> Divergence:
        own = {name: weight for name, weight in weights.items() if name in FUSED}
        if not own:  # to be told how far the student is all the same, without a gradient
            head = student.head._replace(
                weight_VD=student.head.weight_VD.detach(),
                bias_V=None if student.head.bias_V is None else student.head.bias_V.detach(),
            )
            student, own = Rows(student.hidden_ND.detach(), head), {"hard": 0.0}
        if isinstance(teacher, Rows) and teacher.inside.matches_M is not None:
            teacher = None  # it speaks other words
        if len(own) < len(weights) and teacher is not None:
            own = {"forward_kl": 0.0, **own} if own.keys() <= {"hard"} else own
        return soft_and_hard_labels(
            student,
            teacher,
            labels_N,
            config=self.config,
            weights=own,
            temperature=ramp_at(self.config.temperature, self.share),
            vocab_size=self.vocab_size,
        )


def weights_at(config: ObjectiveConfig, share: float) -> dict[str, float]:
    """Weight of each objective at `share` (0 to 1) of the budget."""
    return {name: ramp_at(ramp, share) for name, ramp in config.weights.items()}


def term_names(config: ObjectiveConfig) -> list[str]:
    """The terms beside the fused pass, in the order of `terms_K`."""
    return [name for name in config.weights if name not in FUSED]


def hard_labels(config: ObjectiveConfig, vocab_size: int) -> Objective:
    """The objective of every validation, computed as `config` says, whatever it trains on."""
    return Objective(replace(config, weights={"hard": 1.0}, settings={}, temperature=1.0), vocab_size)
