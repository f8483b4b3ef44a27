"""What a term of the objective is given: one micro-batch as the student and the teacher saw it.

Distributions come as log-probabilities over *buckets*. Of a live teacher each class is a bucket. Of stored targets each
kept class, the label (where its probability is stored) and the rest of the vocabulary as one last bucket, on both
sides. Suffixes: N rows, C rows of a chunk, V vocabulary, K buckets, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.head import Head, Mixture, Pooled
from distill.kernels import SparseTargets
from distill.kernels.terms import gold_as_entry
from distill.models import Rows

CHUNK_BYTES = 1 << 26  # of float32 log-probabilities of one model that are alive at once
ABSENT = -1e4  # log-probability of a bucket that a row does not have: finite, so that it adds 0 and no NaN
LEAST = 1e-12  # probability of a label or a rest that was stored as 0


@dataclass(frozen=True)
class Seen:
    """The counted rows of one micro-batch, and what else a term may look at.

    sequence_N: int64, the number of each row's sequence in the micro-batch. share: of the budget, 0 to 1.
    bucket_V: int64, frequency bucket of each token, 0 for the most frequent. learned: modules of the terms that
    learn something beside the student, by term.
    """

    student: Rows
    teacher: Rows | Pooled | SparseTargets | None
    labels_N: Tensor
    sequence_N: Tensor
    vocab_size: int
    chunk_rows: int = 0  # 0: as many as CHUNK_BYTES allow
    share: float = 0.0
    bucket_V: Tensor | None = None
    learned: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.labels_N.shape[0]

    @property
    def rows_at_once(self) -> int:
        return self.chunk_rows or max(16, CHUNK_BYTES // (4 * self.vocab_size))

    @property
    def live(self) -> Rows:
        """The teacher's rows. Raises ValueError where its targets are stored: they hold no hidden states."""
        if not isinstance(self.teacher, Rows):
            raise ValueError(
                "this term reads the hidden states of one live teacher, which stored targets and ensembles don't have"
            )
        return self.teacher

    @property
    def both_hidden(self) -> tuple[Tensor, Tensor]:
        """[M, D] and [M, E]: what both heads read, of all N rows, or of those that a teacher of other words has too."""
        matches_M = self.live.inside.matches_M
        own_ND = self.student.hidden_ND
        return own_ND if matches_M is None else own_ND[matches_M], self.live.hidden_ND


class Buckets(NamedTuple):
    """Log-probabilities of a chunk of rows.

    student_CK, teacher_CK: of each bucket, ABSENT in both where a row lacks it. gold_C: int64, the label's bucket.
    ids_CK: int64, the class of each bucket, -1 for the rest of the vocabulary, -2 for an absent one; None where
    bucket k is class k. whole_CV: the student's of all classes.
    """

    student_CK: Tensor
    teacher_CK: Tensor
    gold_C: Tensor
    ids_CK: Tensor | None
    whole_CV: Tensor

    def without_gold(self) -> tuple[Tensor, Tensor]:
        """(student_CK, teacher_CK) with the label's bucket absent; not renormalised."""
        gold_CK = is_gold(self)
        return self.student_CK.masked_fill(gold_CK, ABSENT), self.teacher_CK.masked_fill(gold_CK, ABSENT)


def is_gold(seen: Buckets) -> Tensor:
    """[C, K] bool: the label's bucket."""
    index_K = torch.arange(seen.student_CK.shape[1], device=seen.gold_C.device)
    return index_K == seen.gold_C[:, None]


def of_classes(log_p_CK: Tensor, ids_CK: Tensor | None) -> Tensor:
    """[C, K]: the entries of classes alone; the rest of the vocabulary, which is none, is made absent."""
    return log_p_CK if ids_CK is None else log_p_CK.masked_fill(ids_CK < 0, ABSENT)


def of_gold(log_p_CK: Tensor, gold_C: Tensor) -> Tensor:
    """[C]: the label's entry of each row."""
    return log_p_CK.gather(1, gold_C[:, None]).squeeze(1)


def over_rows(
    seen: Seen, function: Callable[[Buckets], Tensor], order_N: Tensor | None = None, overlap: int = 0
) -> Tensor:
    """`over_chunks` of what both models say: `function` of Buckets."""
    return over_chunks(
        seen, lambda hidden_CD, rows_C: function(buckets(hidden_CD, seen, rows_C)), order_N, overlap
    )


def over_chunks(
    seen: Seen,
    function: Callable[[Tensor, Tensor], Tensor],
    order_N: Tensor | None = None,
    overlap: int = 0,
) -> Tensor:
    """`function(hidden_CD, rows_C)` of a chunk of rows after another, its results [C, ...] joined to [N, ...].

    No logits outlive their chunk: the backward pass makes them once more. That costs one more product of both
    heads, and memory for one chunk. order_N: rows in another order. overlap: each chunk also has this many of the
    rows that follow, the first ones after the last; `function` leaves as many out of its result.
    """
    device = seen.labels_N.device
    order_N = torch.arange(seen.num_rows, device=device) if order_N is None else order_N
    around = torch.cat([order_N, order_N[:overlap]])
    size = seen.rows_at_once
    parts = []
    for start in range(0, max(seen.num_rows, 1), size):
        rows_C = around[start : start + size + overlap]
        hidden_CD = seen.student.hidden_ND[rows_C]
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(function, hidden_CD, rows_C, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(function(hidden_CD, rows_C))
    return torch.cat(parts)


def buckets(hidden_CD: Tensor, seen: Seen, rows_C: Tensor) -> Buckets:
    """What student and teacher say of some rows; the student's hidden states are given, as gradients flow there."""
    student_CV = log_probabilities(hidden_CD, seen.student.head, seen.vocab_size)
    said = teacher_buckets(seen, rows_C)
    teacher_CK = said.teacher_CK.to(student_CV.dtype)
    if said.ids_CK is None:
        return Buckets(student_CV, teacher_CK, said.gold_C, None, student_CV)
    kept_CK = student_CV.gather(1, said.ids_CK.clamp(min=0)).masked_fill(said.ids_CK < 0, ABSENT)
    mass_C = kept_CK.logsumexp(1).exp().clamp(max=1 - torch.finfo(kept_CK.dtype).eps)
    student_CK = torch.where(said.ids_CK == -1, torch.log1p(-mass_C)[:, None], kept_CK)
    return Buckets(student_CK, teacher_CK, said.gold_C, said.ids_CK, student_CV)


class Said(NamedTuple):
    """The teacher's side of Buckets."""

    teacher_CK: Tensor
    gold_C: Tensor
    ids_CK: Tensor | None


@torch.no_grad()
def teacher_buckets(seen: Seen, rows_C: Tensor) -> Said:
    """What the teacher says of some rows."""
    labels_C = seen.labels_N[rows_C]
    if isinstance(seen.teacher, (Rows, Pooled)):
        hidden_CD, head = seen.teacher.hidden_ND[rows_C], seen.teacher.head
        return Said(log_probabilities(hidden_CD, head, seen.vocab_size), labels_C, None)
    assert seen.teacher is not None, "no term is without a teacher"
    ids_NK, probs_NK, tail_N, gold_N = seen.teacher
    if tail_N is None or gold_N is None:
        lacks = "the mass of all other classes" if tail_N is None else "the label's probability"
        raise ValueError(
            f"the stored targets lack {lacks}, which this term needs: score targets that keep it, or use forward_kl"
        )
    cut = SparseTargets(ids_NK[rows_C], probs_NK[rows_C], tail_N[rows_C], gold_N[rows_C])
    ids_CK, probs_CK, rest_C, _ = gold_as_entry(cut, labels_C)
    assert rest_C is not None
    here_CK = probs_CK > 0
    known_C1 = (here_CK & (ids_CK == labels_C[:, None]))[:, :-1].any(1, keepdim=True)
    # A label stored with probability 0 is a bucket all the same; the rest is always one.
    here_CK = torch.cat([here_CK[:, :-1], ~known_C1, torch.ones_like(known_C1)], 1)
    ids_CK = torch.cat([ids_CK, ids_CK.new_full((len(ids_CK), 1), -1)], 1).masked_fill(~here_CK, -2)
    said_CK = torch.cat([probs_CK, rest_C[:, None]], 1).clamp(min=LEAST).log().masked_fill(~here_CK, ABSENT)
    return Said(said_CK, (ids_CK == labels_C[:, None]).long().argmax(1), ids_CK)


def log_probabilities(hidden_CD: Tensor, head: Head | Mixture, vocab_size: int) -> Tensor:
    """[C, V] in float32, float64 of float64 hidden states; entries of padding are left out."""
    logits_CV = head(hidden_CD)[:, :vocab_size]
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)).log_softmax(1)


def label_log_probabilities(rows: Rows, labels_N: Tensor, vocab_size: int, chunk_rows: int = 0) -> Tensor:
    """[N]: of each row's label, chunk by chunk; can be derived twice."""

    def of_labels(hidden_CD: Tensor, rows_C: Tensor) -> Tensor:
        return of_gold(log_probabilities(hidden_CD, rows.head, vocab_size), labels_N[rows_C])

    return over_chunks(Seen(rows, None, labels_N, labels_N, vocab_size, chunk_rows), of_labels)


def logits_at(hidden_CD: Tensor, head: Head, ids_CK: Tensor, ids_M: Tensor) -> tuple[Tensor, Tensor]:
    """([C, K], [C, M]): the head's logits of classes that each row chooses, and of some that all share."""
    both = [
        torch.einsum("cd,ckd->ck", hidden_CD, head.weight_VD[ids_CK]),
        hidden_CD @ head.weight_VD[ids_M].T,
    ]
    if head.bias_V is not None:
        both = [both[0] + head.bias_V[ids_CK], both[1] + head.bias_V[ids_M]]
    if head.softcap is not None:
        both = [head.softcap * (x / head.softcap).tanh() for x in both]
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in both)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ arithmetic


def kl(teacher_CK: Tensor, student_CK: Tensor) -> Tensor:
    """[C]: KL(teacher || student) of log-probabilities, nats; absent buckets add 0."""
    return (teacher_CK.exp() * (teacher_CK - student_CK)).sum(-1)


def entropy(log_p_CK: Tensor) -> Tensor:
    """[C]: nats; absent buckets add 0."""
    return -(log_p_CK.exp() * log_p_CK).sum(-1)


def renormalised(log_p_CK: Tensor) -> Tensor:
    """The same made to sum to 1; what is absent stays so, also where all is."""
    total_C1 = log_p_CK.logsumexp(-1, keepdim=True)
    return torch.where(log_p_CK > ABSENT / 2, log_p_CK - total_C1, ABSENT)


def tempered(log_p_CK: Tensor, temperature: float) -> Tensor:
    """log softmax(log p / T), which for T = 1 is log p itself and for classes log softmax(logits / T)."""
    here_CK = log_p_CK > ABSENT / 2
    return renormalised(torch.where(here_CK, log_p_CK / temperature, ABSENT))


def binary_kl(teacher_C: Tensor, student_C: Tensor, teacher_rest_C: Tensor, student_rest_C: Tensor) -> Tensor:
    """[C]: KL of two events with the given log-probabilities and those of their complements."""
    return kl(torch.stack([teacher_C, teacher_rest_C], 1), torch.stack([student_C, student_rest_C], 1))
