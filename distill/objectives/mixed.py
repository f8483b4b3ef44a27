"""Both models on inputs that nobody wrote."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from distill.objectives.seen import Seen, kl, over_rows


def mixkd(seen: Seen) -> Tensor:
    """sum_n KL( p_t(x') || p_s(x') ), x' = lambda e_b + (1 - lambda) e_b-1, mixed word embeddings of two sequences.

    Each model mixes its own embeddings, by the same lambda, and keeps mask and counted rows of sequence b; the labels
    are left to the other terms. Costs a second run of both trunks; a live teacher alone can answer. Depends on the
    micro-batch, of whose neighbours x' is made; in one of a single sequence x' is that sequence. Source: MixKD
    (2011.00593, ICLR 2021) [R], there on texts of a class.
    """
    student, teacher = seen.student, seen.live
    assert student.inside.mixed_ND is not None and teacher.inside.mixed_ND is not None, "needs `mixed`"
    again = replace(
        seen,
        student=student._replace(hidden_ND=student.inside.mixed_ND),
        teacher=teacher._replace(hidden_ND=teacher.inside.mixed_ND),
    )
    return over_rows(again, lambda rows: kl(rows.teacher_CK, rows.student_CK)).sum()
