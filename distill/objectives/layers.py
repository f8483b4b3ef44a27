"""Hidden states and attentions of the teacher's layers, for a live teacher.

The student's layer l of S stands beside the teacher's layer l T / S of T, rounded with halves up, the first at least.
Hidden states are those of the counted rows alone. Their memory is kept for the whole backward pass: (S + T) N D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from distill.objectives.seen import Seen, kl

BLOCK_ROWS = 512  # that attend to each other in the predictor of `dpk`


def projection(student_width: int, teacher_width: int) -> nn.Module:
    """From the student's hidden states to the teacher's."""
    return nn.Linear(student_width, teacher_width, bias=False)


def projection_if_needed(student_width: int, teacher_width: int) -> nn.Module:
    return nn.Identity() if student_width == teacher_width else projection(student_width, teacher_width)


def pairs(num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """(layer of the student, layer of the teacher) from 1, both evenly."""
    return [
        (i, max(1, (2 * i * num_teacher + num_student) // (2 * num_student)))
        for i in range(1, num_student + 1)
    ]


def paired_layers(seen: Seen) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) hidden states [N, D] after each pair of layers; those of the embeddings left out."""
    student, teacher = seen.student.inside.layers, seen.live.inside.layers
    return [(student[i], teacher[j]) for i, j in pairs(len(student) - 1, len(teacher) - 1)]


def hidden_cosine(seen: Seen) -> Tensor:
    """sum_n 1 - cos( P h_s, h_t ) after the last layer. P: learned where the widths differ, else left out.

    Source: DistilBERT (1910.01108), its cosine embedding loss; weight 1 beside 5 of KL and 2 of MLM there [R].
    """
    student_ND, teacher_ND = paired_layers(seen)[-1]
    projected_ND = seen.learned["hidden_cosine"](student_ND)
    return (1 - cosine_similarity(projected_ND.float(), teacher_ND.float(), dim=1)).sum()


def hidden_square(seen: Seen) -> Tensor:
    """sum_n mean_l |P h_s^l - h_t^l|^2 / D_t, P [D_t, D_s] learned, one for all layers.

    Source: HomoDistil (2302.09632, ICLR 2023), equation of its layer-wise term; the mean over layers and width ours.
    """
    project, chosen = seen.learned["hidden_square"], paired_layers(seen)
    squares = [(project(s) - t).float().square().mean(1).sum() for s, t in chosen]
    return torch.stack(squares).mean()


def attention_kl(seen: Seen) -> Tensor:
    """sum_n mean_l KL( A_t^l || A_s^l ), A [L]: how much row n attends to each position, the mean over heads.

    Both models compute attention in the plain way for it, which is slower and keeps [B, H, L, L] a layer.
    Source: MiniLM (2002.10957), at every pair of layers as HomoDistil has it; the mean over heads, which need not be
    equally many, ours.
    """
    student, teacher = seen.student.inside.attentions, seen.live.inside.attentions
    found = []
    for i, j in pairs(len(student), len(teacher)):
        own_NL, other_NL = (x.float().mean(1).clamp(min=1e-9).log() for x in (student[i - 1], teacher[j - 1]))
        found.append(kl(other_NL, own_NL).sum())
    return torch.stack(found).mean()


def curriculum(seen: Seen, *, until: float = 0.5) -> Tensor:
    """sum_n |h_s^l - R_l h_t^l|^2 / D_s for one layer l at a time, shallow to deep in the first `until` of the budget.

    R_l [D_s, D_t]: fixed, entries N(0, 1 / D_t) of the seed l. After `until` it is 0: then the outputs alone teach.
    Source: curriculum extraction (2503.17494), which replaces a trajectory by the final teacher's layers; the even
    split of the budget ours.
    """
    chosen = paired_layers(seen)
    if seen.share >= until:
        return seen.student.hidden_ND.sum() * 0.0
    index = min(int(seen.share / until * len(chosen)), len(chosen) - 1)
    student_ND, teacher_ND = chosen[index]
    shape = (student_ND.shape[1], teacher_ND.shape[1])
    random = torch.randn(shape, generator=torch.Generator().manual_seed(index + 1)) / shape[1] ** 0.5
    wanted_ND = teacher_ND @ random.to(teacher_ND).T
    return (student_ND - wanted_ND).float().square().mean(1).sum()


class PriorPredictor(nn.Module):
    """Makes the teacher's hidden states of a mixture of both models', by one layer of attention."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.project = projection(student_width, teacher_width)
        self.query, self.key, self.value = (projection(teacher_width, teacher_width) for _ in range(3))

    def forward(self, student_ND: Tensor, teacher_ND: Tensor, given_N: Tensor, sequence_N: Tensor) -> Tensor:
        """[N, D_t]. given_N bool: rows where the teacher's own stand; rows attend within their sequence, in blocks.

        What is learned meets all rows at once, so that each rank gathers it as often, whatever its rows.
        """
        mixed_ND = torch.where(given_N[:, None], teacher_ND, self.project(student_ND))
        sides = (self.query(mixed_ND), self.key(mixed_ND), self.value(mixed_ND), sequence_N)
        blocks = zip(*(side.split(BLOCK_ROWS) for side in sides), strict=True)
        return mixed_ND + torch.cat([_attended(*each) for each in blocks])


def _attended(query_ND: Tensor, key_ND: Tensor, value_ND: Tensor, sequence_N: Tensor) -> Tensor:
    scores_NN = query_ND @ key_ND.T / query_ND.shape[1] ** 0.5
    apart_NN = sequence_N[:, None] != sequence_N[None, :]
    return scores_NN.float().masked_fill(apart_NN, -torch.inf).softmax(1).to(value_ND.dtype) @ value_ND


def dpk(seen: Seen) -> Tensor:
    """sum over rows not given of |pred(mix)_n - h_t,n|^2 / D_t; the mix has h_t at a share r of rows, P h_s elsewhere.

    r = 1 - CKA(h_s, h_t) over the micro-batch, which rows is drawn anew every time; h after the last layer. The nearer
    the student, the less prior knowledge it is given. Depends on the micro-batch. Source: DPK (2206.06067, ICLR
    2023), whose decoder of image features is here one layer of attention within a sequence.
    """
    student_ND, teacher_ND = paired_layers(seen)[-1]
    teacher_ND = teacher_ND.to(student_ND.dtype)
    given_N = torch.rand(seen.num_rows).to(student_ND.device) < 1 - cka(student_ND.detach(), teacher_ND)
    predicted_ND = seen.learned["dpk"](student_ND, teacher_ND, given_N, seen.sequence_N)
    return (predicted_ND - teacher_ND).float().square().mean(1).masked_fill(given_N, 0.0).sum()


def cka(one_ND: Tensor, other_NE: Tensor) -> Tensor:
    """Linear centred kernel alignment of two representations of the same rows, 0 to 1 (Kornblith et al., ICML 2019)."""
    one_ND, other_NE = (x.float() - x.float().mean(0) for x in (one_ND, other_NE))
    across, within, other = one_ND.T @ other_NE, one_ND.T @ one_ND, other_NE.T @ other_NE
    return across.square().sum() / (within.norm() * other.norm()).clamp(min=1e-12)
