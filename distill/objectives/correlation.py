"""The teacher's ranking of classes and rows, not its values: CMKD and CLKD."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill.objectives.seen import ABSENT, Buckets, Seen, entropy, of_classes, over_rows, teacher_buckets


def pearson(seen: Seen, *, classes: int = 64) -> Tensor:
    """sum_n 1 - rho( log p_s, log p_t ) over the teacher's `classes` likeliest classes of the row.

    rho is Pearson's correlation, to which shift and scale of the logits make no difference; a row in which either
    side is constant has rho 0. Stored targets serve with as many classes as they keep of a row.
    Source: CMKD (2410.06561), the linear part; `cmkd` has both.
    """
    return over_rows(seen, lambda rows: 1 - correlation(*_likeliest(rows, classes))).sum()


def spearman(seen: Seen, *, classes: int = 32, temperature: float = 0.5) -> Tensor:
    """sum_n 1 - rho( r(log p_s), log p_t's r ), Pearson's rho of soft ranks over the teacher's likeliest classes.

    r_i(z) = 1/2 + sum_j sigmoid((z_j - z_i) / temperature), 1 for the largest as temperature -> 0. Memory and time
    grow with classes^2 a row. Source: CMKD (2410.06561), the monotonic part; its form of soft rank is recalled [R].
    """

    return over_rows(seen, lambda rows: 1 - _rank_correlation(*_likeliest(rows, classes), temperature)).sum()


def cmkd(seen: Seen, *, classes: int = 32, temperature: float = 0.5) -> Tensor:
    """sum_n (1 - h_n) (1 - rho_n of `pearson`) + h_n (1 - rho_n of `spearman`), h_n = H(p_t) / log V, 0 to 1.

    Where the teacher is sure the student takes over its values up to scale, where it is not their order alone.
    Source: CMKD (2410.06561), whose abstract says that the weights of both parts follow the row's difficulty; that
    this is the teacher's entropy is [R], which part a difficult row leans to and that h is linear in it, ours.
    """

    def of_rows(rows: Buckets) -> Tensor:
        sides = _likeliest(rows, classes)
        difficulty_C = entropy(rows.teacher_CK) / math.log(seen.vocab_size)
        by_value_C, by_rank_C = 1 - correlation(*sides), 1 - _rank_correlation(*sides, temperature)
        return (1 - difficulty_C) * by_value_C + difficulty_C * by_rank_C

    return over_rows(seen, of_rows).sum()


def clkd(
    seen: Seen, *, classes: int = 256, row: float = 1.0, column: float = 1.0, between: float = 1.0
) -> Tensor:
    """N * ( a * mean_n |^z_s,n - ^z_t,n|^2 + b * mean_c |^z_s,c - ^z_t,c|^2 + g * mean_cc' (R_s - R_t)^2_cc' ).

    z [N, K] are log-probabilities of the K = classes that the teacher holds for likeliest in the micro-batch as a
    whole. ^z_n: a row, ^z_c: a column, each minus its mean and of length 1. R = ^z^T ^z of columns: the correlation
    between classes. a = row, b = column, g = between. Depends on the micro-batch: its rows are the columns' entries.
    Keeps [N, K] of both models and [K, K]. Source: CLKD (2211.14773); norms and the mean in place of sums [R].
    """
    chosen_K = _common_classes(seen, min(classes, seen.vocab_size))
    both_N2K = over_rows(
        seen, lambda rows: torch.stack([x[:, chosen_K] for x in (rows.student_CK, rows.teacher_CK)], 1)
    )
    if seen.num_rows == 0:
        return both_N2K.sum()
    by_row = _apart(*(_standard(z, 1) for z in both_N2K.unbind(1))).sum(1).mean()
    student_NK, teacher_NK = (_standard(z, 0) for z in both_N2K.unbind(1))
    by_column = _apart(student_NK, teacher_NK).sum(0).mean()
    by_pair = _apart(student_NK.T @ student_NK, teacher_NK.T @ teacher_NK).mean()
    return seen.num_rows * (row * by_row + column * by_column + between * by_pair)


def correlation(one_CK: Tensor, other_CK: Tensor, here_CK: Tensor) -> Tensor:
    """[C]: Pearson's correlation of both over the entries that are here."""
    count_C1 = here_CK.sum(1, keepdim=True).clamp(min=1)
    centred = []
    for x_CK in (one_CK, other_CK):
        mean_C1 = x_CK.where(here_CK, 0.0).sum(1, keepdim=True) / count_C1
        centred.append((x_CK - mean_C1).where(here_CK, 0.0))
    return (normalize(centred[0], dim=1) * normalize(centred[1], dim=1)).sum(1)


def _likeliest(rows: Buckets, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, whether there) [C, k] at the teacher's likeliest classes; the rest is no class."""
    teacher_CK = of_classes(rows.teacher_CK, rows.ids_CK)
    top_Ck, which_Ck = teacher_CK.topk(min(number, teacher_CK.shape[1]), dim=1)
    return rows.student_CK.gather(1, which_Ck), top_Ck, top_Ck > ABSENT / 2


def _rank_correlation(one_CK: Tensor, other_CK: Tensor, here_CK: Tensor, temperature: float) -> Tensor:
    one_CK, other_CK = (_soft_ranks(x, here_CK, temperature) for x in (one_CK, other_CK))
    return correlation(one_CK, other_CK, here_CK)


def _soft_ranks(z_CK: Tensor, here_CK: Tensor, temperature: float) -> Tensor:
    above_CKK = torch.sigmoid((z_CK[:, None, :] - z_CK[:, :, None]) / temperature)
    return 0.5 + above_CKK.where(here_CK[:, None, :], 0.0).sum(2)


@torch.no_grad()
def _common_classes(seen: Seen, number: int) -> Tensor:
    """[K]: ids of the classes with the largest sum of the teacher's probabilities over all rows."""
    mass_V = seen.student.hidden_ND.new_zeros(seen.vocab_size, dtype=torch.float64)
    for rows_C in torch.arange(seen.num_rows, device=seen.labels_N.device).split(seen.rows_at_once):
        mass_V += teacher_buckets(seen, rows_C).teacher_CK.exp().double().sum(0)
    return mass_V.topk(number).indices


def _standard(z_NK: Tensor, dim: int) -> Tensor:
    return normalize(z_NK - z_NK.mean(dim, keepdim=True), dim=dim)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square()
