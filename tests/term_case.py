"""Micro-batches for the terms of the objective, and what both models say of a row, by another way than the code's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.kernels import Head, SparseTargets
from distill.models import Inside, Rows
from distill.objectives.input_gradients import with_pulls
from distill.objectives.seen import Seen
from distill.objectives.terms import TERMS, learned_modules

V, PADDED = 13, 16  # real classes (an odd number), rows of both heads
WIDTHS = (6, 9)  # of student and teacher
STORED = [name for name, term in TERMS.items() if term.stored]
# Row by row: no row's share depends on which others are in the micro-batch.
ROW_WISE = ("rld", "pearson", "spearman", "cmkd", "cross_head", "double", "double_pairs", "hidden_square", "hidden_cosine",
            "attention_kl", "curriculum")  # fmt: skip
# And kdiga, which takes whole weights: see test_objectives_inputs.
IN_ANY_RUN = [
    name for name in TERMS if name != "preference"
]  # which makes its own texts: see test_preferences


def seen_case(
    num_rows: int = 7,
    *,
    stored: bool = False,
    seed: int = 0,
    scale: float = 1.5,
    learns: str = "",
    **changes: Any,
) -> Seen:
    """Float64 rows of three sequences; hidden states and head of the student are leaves.

    stored: K = 4 kept classes a row, of which one is padding in every second row and some hold the label.
    """
    torch.manual_seed(seed)
    student, teacher = (
        Rows(
            torch.randn(num_rows, width, dtype=torch.float64) * scale / width**0.5,
            Head(
                torch.randn(PADDED, width, dtype=torch.float64) * 2, torch.randn(PADDED, dtype=torch.float64)
            ),
            Inside(
                tuple(torch.randn(num_rows, width, dtype=torch.float64) for _ in range(depth + 1)),
                tuple(
                    torch.rand(num_rows, heads, 5, dtype=torch.float64).log_softmax(2).exp()
                    for _ in range(depth)
                ),
                torch.randn(num_rows, width, dtype=torch.float64),
            ),
        )
        for width, depth, heads in ((WIDTHS[0], 2, 2), (WIDTHS[1], 4, 3))
    )
    assert student.inside.mixed_ND is not None
    student.inside.mixed_ND.requires_grad_()
    for leaf in (
        student.hidden_ND,
        student.head.weight_VD,
        *student.inside.layers,
        *student.inside.attentions,
    ):
        leaf.requires_grad_()
    labels_N, sequence_N = torch.randint(V, (num_rows,)), torch.arange(num_rows) * 3 // max(num_rows, 1)
    if learns == "kdiga":
        student, teacher = (_of_words(rows, sequence_N) for rows in (student, teacher))
        teacher = with_pulls(teacher, labels_N, V)
    targets = stored_targets(teacher, labels_N) if stored else teacher
    learned = learned_modules([learns], *WIDTHS, seed=1) if learns else {}
    for module in learned.values():
        module.double()
    seen = Seen(
        student, targets, labels_N, sequence_N, V, chunk_rows=3,
        bucket_V=torch.arange(V) // 5, learned=learned,
    )  # fmt: skip
    return replace(seen, **changes)


def _of_words(rows: Rows, sequence_N: Tensor) -> Rows:
    """Rows that are made of word embeddings, five a sequence."""
    words_BLD = torch.randn(3, 5, rows.hidden_ND.shape[1], dtype=torch.float64, requires_grad=True)
    hidden_ND = rows.hidden_ND + 0.1 * words_BLD.square().sum(1)[sequence_N]
    return rows._replace(hidden_ND=hidden_ND, inside=rows.inside._replace(words_BLD=words_BLD))


def stored_targets(teacher: Rows, labels_N: Tensor) -> SparseTargets:
    p_NV = probabilities(teacher)
    ids_NK = (
        torch.stack([torch.randperm(V)[:4] for _ in labels_N]) if len(labels_N) else torch.zeros(0, 4).long()
    )
    ids_NK[::3, 0] = labels_N[::3]
    for n in range(len(ids_NK)):  # distinct
        ids_NK[n, 1:] = torch.tensor([c for c in torch.randperm(V).tolist() if c != ids_NK[n, 0]][:3])
    probs_NK = p_NV.gather(1, ids_NK)
    probs_NK[::2, 3] = 0
    return SparseTargets(ids_NK, probs_NK, 1 - probs_NK.sum(1), p_NV.gather(1, labels_N[:, None]).squeeze(1))


def with_heavy_tail(seen: Seen) -> Seen:
    """Two kept classes a row, less likely together than all others; the label is one of them in every second row."""
    labels_N = seen.labels_N
    ids_NK = torch.stack(
        [torch.where(torch.arange(len(labels_N)) % 2 == 0, labels_N, (labels_N + 2) % V), (labels_N + 1) % V],
        1,
    )
    probs_NK = torch.tensor([[0.3, 0.1]], dtype=torch.float64).expand(len(labels_N), 2)
    tail_N = torch.full((len(labels_N),), 0.6, dtype=torch.float64)
    gold_N = torch.where(torch.arange(len(labels_N)) % 2 == 0, probs_NK[:, 0], 0.05)
    return replace(seen, teacher=SparseTargets(ids_NK, probs_NK, tail_N, gold_N))


def probabilities(rows: Rows) -> Tensor:
    """[N, V] by the definition of the softmax."""
    e_NV = (rows.hidden_ND @ rows.head.weight_VD[:V].T + rows.head.bias_V[:V]).exp()  # type: ignore[index]
    return e_NV / e_NV.sum(1, keepdim=True)


@dataclass
class Row:
    """One row over its buckets: probabilities of student and teacher, the label's bucket, the class of each (-1: rest)."""

    student: list[Tensor]
    teacher: list[Tensor]
    gold: int
    ids: list[int]

    @property
    def others(self) -> list[int]:
        return [k for k in range(len(self.ids)) if k != self.gold]

    @property
    def classes(self) -> list[int]:
        return [k for k, c in enumerate(self.ids) if c >= 0]

    def likeliest(self, number: int) -> list[int]:
        return sorted(self.classes, key=lambda k: -float(self.teacher[k]))[:number]


def rows_in(seen: Seen) -> list[Row]:
    own = probabilities(seen.student)
    if isinstance(seen.teacher, Rows):
        other = probabilities(seen.teacher)
        return [
            Row(list(own[n]), list(other[n]), int(seen.labels_N[n]), list(range(V)))
            for n in range(seen.num_rows)
        ]
    found = []
    for n, label in enumerate(seen.labels_N.tolist()):
        ids_NK, probs_NK, _, gold_N = seen.teacher  # type: ignore[misc]
        p = {c: q for c, q in zip(ids_NK[n].tolist(), probs_NK[n], strict=True) if q > 0}
        p.setdefault(label, gold_N[n])
        ids = list(p)
        student, teacher = [own[n, c] for c in ids], list(p.values())
        rest = [1 - sum(student, torch.tensor(0.0)), 1 - sum(teacher, torch.tensor(0.0))]
        found.append(Row([*student, rest[0]], [*teacher, rest[1]], ids.index(label), [*ids, -1]))
    return found


def assert_follows(
    name: str, expected: Callable[[Seen], Tensor], seen: Seen, rtol: float = 1e-9, **settings: Any
) -> None:
    """The term's value and its gradients are those of `expected`, to float64."""
    outcomes = []
    own = seen.student
    inside = [
        *own.inside.layers,
        *own.inside.attentions,
        *([] if own.inside.mixed_ND is None else [own.inside.mixed_ND]),
    ]
    learned = [p for module in seen.learned.values() for p in module.parameters()]
    given = [own.hidden_ND, own.head.weight_VD, *inside, *learned]
    leaves = [tensor for tensor in given if tensor.requires_grad]
    for function in (lambda s: TERMS[name].function(s, **settings), expected):
        torch.manual_seed(5)
        value = function(seen)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        outcomes.append(
            (
                value.detach().double(),
                [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)],
            )
        )
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=rtol, atol=rtol)
    assert any(bool(g.abs().max() > 0) for g in outcomes[0][1] if g.numel()), "a gradient somewhere"
