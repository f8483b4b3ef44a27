"""Comparative and double distillation: their equations in loops, their identities and limit cases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from term_case import Row, V, assert_follows, probabilities, rows_in, seen_case, with_heavy_tail
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from distill.kernels import Head, SparseTargets
from distill.models import Rows
from distill.objectives.comparative import ckd_hidden
from distill.objectives.double import double_softmax, sampled_softmax
from distill.objectives.seen import Seen
from distill.objectives.terms import TERMS

BOTH = pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
ZERO = torch.tensor(0.0, dtype=torch.float64)


def softmax(z: list[Tensor]) -> list[Tensor]:
    e = [x.exp() for x in z]
    return [x / sum(e, ZERO) for x in e]


def said(row: Row, own: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (student, teacher) of class c; what a row does not keep has an even share of its rest."""
    if c in row.ids:
        return own[c].log(), row.teacher[row.ids.index(c)].log()
    kept = sum(c >= 0 for c in row.ids)
    return own[c].log(), (row.teacher[row.ids.index(-1)] / (V - kept)).log()


def ckd(group: int, temperature: float, labels: float) -> Callable[[Seen], Tensor]:
    def difference(z: list[Tensor]) -> Tensor:
        first = math.ceil(group / 2)
        return sum(z[:first], ZERO) / first - sum(z[first:], ZERO) / (group - first)

    def expected(seen: Seen) -> Tensor:
        rows, own, found = rows_in(seen), probabilities(seen.student), ZERO
        order = torch.randperm(seen.num_rows).tolist()
        for i in range(seen.num_rows):
            members = [order[(i + j) % seen.num_rows] for j in range(group)]
            classes = sorted({c for n in members for c in rows[n].ids if c >= 0})
            pairs = [[said(rows[n], own[n], c) for n in members] for c in classes]
            student, teacher = (
                softmax([difference([m[side] for m in p]) / temperature for p in pairs]) for side in (0, 1)
            )
            gold = [
                [torch.tensor(float(rows[n].ids[rows[n].gold] == c)).double() for n in members]
                for c in classes
            ]
            hard = softmax([difference(g) / temperature for g in gold])
            for target, weight in ((teacher, 1.0), (hard, labels)):
                parts = [t * (t / s).log() for t, s in zip(target, student, strict=True)]
                found = found + weight * temperature**2 * sum(parts, ZERO)
        return found

    return expected


@BOTH
@pytest.mark.parametrize(("group", "labels"), [(2, 0.0), (3, 0.5), (4, 0.0)])
def test_ckd_follows_the_equation(group: int, labels: float, stored: bool) -> None:
    settings = {"group": group, "temperature": 4.0, "labels": labels}
    assert_follows("ckd", ckd(group, 4.0, labels), seen_case(stored=stored), rtol=1e-8, **settings)


def test_ckd_of_fewer_rows_than_a_tuple_is_zero() -> None:
    value = TERMS["ckd"].function(seen_case(2), group=3)
    assert float(value.detach()) == 0


def test_ckd_sees_no_offset_that_all_rows_share() -> None:
    """Which is why the config asks for an anchor."""
    seen = seen_case()
    shifted = seen.student.head._replace(bias_V=seen.student.head.bias_V + torch.randn(16).double())  # type: ignore[operator]
    values = []
    for head in (seen.student.head, shifted):
        torch.manual_seed(0)
        values.append(TERMS["ckd"].function(seen_case(student=seen.student._replace(head=head))))
    torch.testing.assert_close(values[0], values[1])


def test_all_pairs_of_squared_differences_are_centred_matching() -> None:
    seen = seen_case(learns="ckd_hidden")
    project = seen.learned["ckd_hidden"].weight  # type: ignore[union-attr]
    pairs = ZERO
    for i, j in itertools.product(range(7), repeat=2):
        own, other = (x.hidden_ND[i] - x.hidden_ND[j] for x in (seen.student, seen.live))
        pairs = pairs + (project @ own - other).square().sum()  # type: ignore[operator]
    torch.testing.assert_close(ckd_hidden(seen).double(), pairs / (2 * 7 * 9), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ double


def double(seen: Seen) -> Tensor:
    found = ZERO
    for row in rows_in(seen):
        for y in row.classes:
            p = row.teacher[y]
            against = [
                (1 - q if k in row.classes else 1) * s / row.student[y]
                for k, (q, s) in enumerate(zip(row.teacher, row.student, strict=True))
                if k != y
            ]
            found = found + p * (1 + sum(against, ZERO)).log()
    return found


def double_pairs(classes: int) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        found = ZERO
        for row in rows_in(seen):
            for y, z in itertools.permutations(row.likeliest(classes), 2):
                gap = row.student[z].log() - row.student[y].log()
                found = found + row.teacher[y] * (1 - row.teacher[z]) * (1 + gap.exp()).log()
        return found

    return expected


def double_sampled(classes: int, samples: int) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        drawn = torch.randint(V, (samples,)).tolist()
        own, found = probabilities(seen.student), ZERO
        for n, row in enumerate(rows_in(seen)):
            kept = row.likeliest(classes)
            kept += [row.gold] if row.gold not in kept else []
            ids = [row.ids[k] for k in kept]
            mass = sum((row.teacher[k] for k in kept), ZERO)
            outside = sum((own[n, c] for c in drawn if c not in ids), ZERO) * V / samples
            for k in kept:
                inside = [(1 - row.teacher[j]) * row.student[j] for j in kept if j != k]
                z = 1 + (sum(inside, ZERO) + outside) / row.student[k]
                found = found + row.teacher[k] / mass * z.log()
        return found

    return expected


@BOTH
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize(
    ("name", "expected", "settings"),
    [
        ("double", double, {}),
        ("double_pairs", double_pairs(3), {"classes": 3}),
        ("double_sampled", double_sampled(3, 5), {"classes": 3, "samples": 5}),
    ],
)
def test_double_distillation_follows_the_equation(
    name: str, expected: Callable[[Seen], Tensor], settings: dict[str, int], num_rows: int, stored: bool
) -> None:
    assert_follows(name, expected, seen_case(num_rows, stored=stored), rtol=1e-8, **settings)


@pytest.mark.parametrize(
    ("name", "expected", "settings"),
    [("double", double, {}), ("double_pairs", double_pairs(3), {"classes": 3})],
)
def test_rest_of_the_vocabulary_is_no_positive_and_a_full_negative(
    name: str, expected: Callable[[Seen], Tensor], settings: dict[str, int]
) -> None:
    assert_follows(name, expected, with_heavy_tail(seen_case()), rtol=1e-8, **settings)


def random_logits(seed: int) -> Tensor:
    return torch.randn(5, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_double_of_a_teacher_that_is_one_hot_is_cross_entropy() -> None:
    z, labels = random_logits(1), torch.arange(5)
    sure = torch.full_like(z, -600.0).scatter(1, labels[:, None], 0.0)
    expected = cross_entropy(z, labels, reduction="none")
    torch.testing.assert_close(double_softmax(z, sure), expected)
    ids = torch.arange(V).expand(5, V)
    nothing = torch.zeros(0, dtype=torch.long)
    torch.testing.assert_close(sampled_softmax(z, sure, ids, z[:, nothing], nothing, V), expected)


def test_without_the_weights_of_negatives_double_is_soft_cross_entropy() -> None:
    """KL plus the teacher's entropy: with weights of 1 the inner sum is Z / e^f."""
    z, p = random_logits(1), random_logits(2).softmax(1)
    full = (p * (z.logsumexp(1, keepdim=True) - z)).sum(1)
    entropy = -(p * p.log()).sum(1)
    torch.testing.assert_close(full, kl_div(z.log_softmax(1), p, reduction="none").sum(1) + entropy)
    flat = p / 1e9  # a teacher that holds nothing for likely spares no negative, and the outer weights scale
    torch.testing.assert_close(double_softmax(z, flat.log()) * 1e9, full, rtol=1e-6, atol=1e-6)


def test_double_spares_what_the_teacher_holds_for_likely() -> None:
    """Between two wrong classes the likelier one is pushed down less."""
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[0.5, 0.4, 0.05, 0.05]], dtype=torch.float64)
    grad = torch.autograd.grad(double_softmax(z, p.log()).sum(), z)[0][0]
    assert grad[1] < 0 < grad[2]


def test_estimate_of_the_negatives_is_right_on_average() -> None:
    """All draws of one class, each as likely: the mean of their sums is the sum over what is not kept."""
    z, ids = random_logits(1)[:1], torch.tensor([[0, 4]])
    means = []
    for c in range(V):
        drawn = torch.tensor([c])
        estimate = V * z[0, c].exp() * float(c not in (0, 4))
        said = sampled_softmax(z[:, [0, 4]], torch.tensor([[0.0, -1e4]]).double(), ids, z[:, drawn], drawn, V)
        # a one-hot teacher on class 0, class 4 absent: log(1 + estimate / e^f_0), where 4 counts as not kept
        estimate = estimate if c != 4 else V * z[0, c].exp()
        torch.testing.assert_close(said[0], (1 + estimate / z[0, 0].exp()).log())
        means.append(estimate / V)
    torch.testing.assert_close(sum(means, ZERO), z[0, 1:].exp().sum())


def test_classes_that_were_not_drawn_have_no_gradient() -> None:
    seen = seen_case(1)
    torch.manual_seed(9)
    drawn = set(torch.randint(V, (2,)).tolist())
    torch.manual_seed(9)
    value = TERMS["double_sampled"].function(seen, classes=2, samples=2)
    grad = torch.autograd.grad(value, seen.student.head.weight_VD)[0]
    row = rows_in(seen)[0]
    touched = {*drawn, *(row.ids[k] for k in row.likeliest(2)), row.gold}
    assert {n for n in range(16) if float(grad[n].abs().max()) > 0} <= touched
    assert len(touched) < V


def test_draws_that_cover_all_make_the_sampled_form_the_full_one() -> None:
    seen = seen_case()
    torch.testing.assert_close(
        TERMS["double_sampled"].function(seen, classes=V, samples=1), TERMS["double"].function(seen)
    )


def test_softcap_of_the_student_reaches_the_sampled_logits() -> None:
    seen = seen_case()
    capped = Rows(seen.student.hidden_ND, Head(*seen.student.head[:2], 3.0))
    both = [
        TERMS[name].function(seen_case(student=capped), **keys)
        for name, keys in (("double", {}), ("double_sampled", {"classes": V, "samples": 1}))
    ]
    torch.testing.assert_close(both[0], both[1])


def test_targets_without_a_rest_or_the_label_are_refused() -> None:
    seen = seen_case(stored=True)
    ids, probs, tail, gold = seen.teacher  # type: ignore[misc]
    for targets, lacks in (
        (SparseTargets(ids, probs, None, gold), "the mass of all other classes"),
        (SparseTargets(ids, probs, tail, None), "the label's probability"),
    ):
        with pytest.raises(ValueError, match=f"the stored targets lack {lacks}"):
            TERMS["double"].function(seen_case(teacher=targets))
