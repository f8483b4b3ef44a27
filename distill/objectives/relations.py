"""How rows stand to each other: relationship matching and contrastive alignment, for a live teacher.

All depend on the micro-batch, within which rows are compared in blocks of BLOCK_ROWS. No vocabulary enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill.objectives.layers import projection
from distill.objectives.seen import Seen, kl

BLOCK_ROWS = 256


def relations(seen: Seen, *, temperature: float = 0.1) -> Tensor:
    """sum_i KL( softmax_j cos(t_i, t_j) / T || softmax_j cos(s_i, s_j) / T ), j != i; s, t: what both heads read.

    No dimension, class or vocabulary of the two models has to agree. Source: relationship matching, ReFilled
    (2205.01915), its first stage without the search for hard tuples.
    """
    return in_blocks(lambda s, t: relation_kl(s, t, temperature), *seen.both_hidden)


def relation_kl(student_ND: Tensor, teacher_NE: Tensor, temperature: float) -> Tensor:
    """The equation of `relations` for one block."""
    own_NN, other_NN = (_similarities(x, temperature) for x in (student_ND, teacher_NE))
    return kl(other_NN, own_NN).sum()


def _similarities(rows_ND: Tensor, temperature: float) -> Tensor:
    """[N, N - 1] log-softmax of each row's cosines with the others."""
    unit_ND, number = normalize(rows_ND.float(), dim=1), rows_ND.shape[0]
    apart_NN = ~torch.eye(number, dtype=torch.bool, device=rows_ND.device)
    return (unit_ND @ unit_ND.T / temperature)[apart_NN].view(number, number - 1).log_softmax(1)


class Aligner(nn.Module):
    """Cosines between projected rows of the student and rows of the teacher, with a learned scale and bias.

    What is learned enters here, for all rows at once, so that each rank gathers it as often, whatever its rows.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.project = projection(student_width, teacher_width)
        self.log_scale, self.bias = nn.Parameter(torch.tensor([math.log(10.0)])), nn.Parameter(torch.zeros(1))

    def forward(self, student_ND: Tensor, teacher_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (s, t, u) of E + 1 numbers: s . u is scale * cos(student, teacher) + bias, t . u that of two of the teacher."""
        own_NE, other_NE = (normalize(x.float(), dim=1) for x in (self.project(student_ND), teacher_NE))
        scale, bias_N1 = self.log_scale.float().exp(), self.bias.float().expand(len(own_NE), 1)
        scaled = [torch.cat([x_NE * scale, bias_N1.to(x_NE.dtype)], 1) for x_NE in (own_NE, other_NE)]
        return scaled[0], scaled[1], torch.cat([other_NE, torch.ones_like(bias_N1)], 1)


def contrastive(seen: Seen, *, consistency: float = 1.0) -> Tensor:
    """sum_i -log softmax_j( a cos(P s_i, t_j) + b )_i + w KL( softmax_j a cos(P s_i, t_j) || softmax_j a cos(t_i, t_j) ).

    P, a, b are learned beside the student, the teacher's side of the second part carries no gradient; w = consistency.
    Source: discriminative and consistent distillation (2407.11802), without a memory of other batches. b has no effect
    within a softmax, as is so there.
    """

    def of_block(student_NE: Tensor, teacher_NE: Tensor, unit_NE: Tensor) -> Tensor:
        crossed_NN = (student_NE @ unit_NE.T).log_softmax(1)
        own_NN = (teacher_NE @ unit_NE.T).detach().log_softmax(1)
        return consistency * kl(crossed_NN, own_NN).sum() - crossed_NN.diagonal().sum()

    return in_blocks(of_block, *seen.learned["contrastive"](*seen.both_hidden))


def in_blocks(function: Callable[..., Tensor], *sides: Tensor) -> Tensor:
    """Sum over blocks of rows of `function` of each side's; of a block of one row there is nothing to compare."""
    blocks = zip(*(side.split(BLOCK_ROWS) for side in sides), strict=True)
    return sum((function(*each) for each in blocks if len(each[0]) > 1), sides[0].float().sum() * 0.0)
