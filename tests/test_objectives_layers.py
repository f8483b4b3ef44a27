"""Terms on hidden states, attentions, relations and the teacher's head, next to their equations in loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from term_case import IN_ANY_RUN, WIDTHS, assert_follows, probabilities, seen_case
from torch import Tensor

from distill.models import Rows
from distill.objectives.correlation import clkd
from distill.objectives.layers import cka, pairs
from distill.objectives.relations import relation_kl
from distill.objectives.seen import Seen
from distill.objectives.terms import TERMS

ZERO = torch.tensor(0.0, dtype=torch.float64)
FLOAT32 = 1e-5  # terms on hidden states sum in float32


def weight(seen: Seen, name: str) -> Tensor:
    found = seen.learned[name]
    return (found.project.weight if hasattr(found, "project") else found.weight).detach()  # type: ignore


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum((a * (a / b).log() for a, b in zip(p, q, strict=True)), ZERO)


def softmax(z: list[Tensor]) -> list[Tensor]:
    e = [x.exp() for x in z]
    return [x / sum(e, ZERO) for x in e]


def cross_head(seen: Seen) -> Tensor:
    found, p = ZERO, seen.learned["cross_head"].weight
    for n, said in enumerate(probabilities(seen.live)):
        z = seen.live.head.weight_VD[:13] @ (p @ seen.student.hidden_ND[n]) + seen.live.head.bias_V[:13]  # type: ignore
        found = found + kl(list(said), softmax(list(z)))
    return found


def mixkd(seen: Seen) -> Tensor:
    again = [x._replace(hidden_ND=x.inside.mixed_ND) for x in (seen.student, seen.live)]
    both = [probabilities(x) for x in again]
    return sum((kl(list(t), list(s)) for s, t in zip(*both, strict=True)), ZERO)


def hidden_cosine(seen: Seen) -> Tensor:
    p = seen.learned["hidden_cosine"].weight
    both = zip(seen.student.inside.layers[-1], seen.live.inside.layers[-1], strict=True)
    return sum((1 - cosine(p @ s, t) for s, t in both), ZERO)  # type: ignore[operator]


def hidden_square(seen: Seen) -> Tensor:
    p, found = seen.learned["hidden_square"].weight, ZERO
    for own, other in ((1, 2), (2, 4)):
        for s, t in zip(seen.student.inside.layers[own], seen.live.inside.layers[other], strict=True):
            found = found + (p @ s - t).square().sum() / 9 / 2  # type: ignore[operator]
    return found


def attention_kl(seen: Seen) -> Tensor:
    found = ZERO
    for own, other in ((0, 1), (1, 3)):
        for s, t in zip(seen.student.inside.attentions[own], seen.live.inside.attentions[other], strict=True):
            found = found + kl(list(t.sum(0) / 3), list(s.sum(0) / 2)) / 2
    return found


def curriculum(layer: int) -> Callable[[Seen], Tensor]:
    def expected(seen: Seen) -> Tensor:
        random = torch.randn(WIDTHS, generator=torch.Generator().manual_seed(layer)).double() / 3
        both = zip(seen.student.inside.layers[layer], seen.live.inside.layers[2 * layer], strict=True)
        return sum(((s - random @ t).square().sum() / 6 for s, t in both), ZERO)

    return expected


def relations(seen: Seen) -> Tensor:
    found, number = ZERO, seen.num_rows
    for i in range(number):
        sides = [
            softmax([cosine(x.hidden_ND[i], x.hidden_ND[j]) / 0.2 for j in range(number) if j != i])
            for x in (seen.live, seen.student)
        ]
        found = found + kl(*sides)
    return found


def contrastive(seen: Seen) -> Tensor:
    m, found, number = seen.learned["contrastive"], ZERO, seen.num_rows
    scale, p = m.log_scale.exp(), m.project.weight  # type: ignore
    s, t = seen.student.hidden_ND @ p.T, seen.live.hidden_ND  # type: ignore
    for i in range(number):
        crossed = softmax([scale[0] * cosine(s[i], t[j]) for j in range(number)])  # type: ignore
        own = [x.detach() for x in softmax([scale[0] * cosine(t[i], t[j]) for j in range(number)])]  # type: ignore
        found = found - crossed[i].log() + 0.5 * kl(crossed, own)
    return found


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize(
    ("name", "expected", "settings"),
    [
        ("cross_head", cross_head, {}),
        ("mixkd", mixkd, {}),
        ("hidden_cosine", hidden_cosine, {}),
        ("hidden_square", hidden_square, {}),
        ("attention_kl", attention_kl, {}),
        ("curriculum", curriculum(1), {"until": 0.8}),
    ],
)
def test_term_and_its_gradient_follow_the_equation(
    name: str, expected: Callable[[Seen], Tensor], settings: dict[str, float], num_rows: int
) -> None:
    assert_follows(name, expected, seen_case(num_rows, learns=name), rtol=FLOAT32, **settings)


@pytest.mark.parametrize(
    ("name", "expected", "settings"),
    [("relations", relations, {"temperature": 0.2}), ("contrastive", contrastive, {"consistency": 0.5})],
)
def test_relation_and_its_gradient_follow_the_equation(
    name: str, expected: Callable[[Seen], Tensor], settings: dict[str, float]
) -> None:
    assert_follows(name, expected, seen_case(7, learns=name), rtol=FLOAT32, **settings)


@pytest.mark.parametrize(("share", "layer"), [(0.0, 1), (0.39, 1), (0.41, 2), (0.79, 2)])
def test_curriculum_goes_from_shallow_to_deep(share: float, layer: int) -> None:
    assert_follows("curriculum", curriculum(layer), seen_case(share=share), rtol=FLOAT32, until=0.8)


def test_curriculum_ends() -> None:
    assert float(TERMS["curriculum"].function(seen_case(share=0.8), until=0.8).detach()) == 0


def test_layers_are_paired_evenly_and_end_on_the_last() -> None:
    assert pairs(3, 12) == [(1, 4), (2, 8), (3, 12)]
    assert pairs(2, 2) == [(1, 1), (2, 2)]
    assert pairs(4, 3)[-1] == (4, 3)


def test_student_deeper_than_its_teacher_meets_no_layer_0() -> None:
    assert pairs(4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert pairs(6, 2) == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_prior_knowledge_is_what_the_student_lacks() -> None:
    """A student whose states are the teacher's turned is given nothing, one that is unrelated nearly all."""
    one = torch.randn(400, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(
        torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )[0]
    other = torch.randn(400, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert float(cka(one, 3 * one @ turn + 1)) == pytest.approx(1, abs=1e-5)
    assert float(cka(one, other)) < 0.1


def test_dpk_follows_the_equation() -> None:
    def expected(seen: Seen) -> Tensor:
        m, s, t = seen.learned["dpk"], seen.student.inside.layers[-1], seen.live.inside.layers[-1]
        centred = [x.detach() - x.detach().mean(0) for x in (s, t)]
        gram = [x @ x.T for x in centred]  # CKA by its other form, over rows
        near = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
        given = [bool(x < 1 - near) for x in torch.rand(7)]
        mixed = [t[n] if given[n] else m.project.weight @ s[n] for n in range(7)]  # type: ignore
        found = ZERO
        for n in (n for n in range(7) if not given[n]):
            same = [k for k in range(7) if seen.sequence_N[k] == seen.sequence_N[n]]
            weights = softmax(
                [((m.query.weight @ mixed[n]) * (m.key.weight @ mixed[k])).sum() / 3 for k in same]  # type: ignore
            )
            made = mixed[n] + sum(
                (w * (m.value.weight @ mixed[k]) for w, k in zip(weights, same, strict=True)), ZERO
            )  # type: ignore
            found = found + (made - t[n]).square().sum() / 9
        return found

    assert_follows("dpk", expected, seen_case(7, learns="dpk"), rtol=FLOAT32)


def test_clkd_follows_the_equation() -> None:
    def unit(z: list[Tensor]) -> list[Tensor]:
        mean = sum(z, ZERO) / len(z)
        length = sum(((x - mean).square() for x in z), ZERO).sqrt()
        return [(x - mean) / length for x in z]

    def expected(seen: Seen) -> Tensor:
        own, other = (probabilities(x) for x in (seen.student, seen.live))
        chosen = other.sum(0).topk(4).indices.tolist()
        z = [[[p[n, c].log() for c in chosen] for n in range(7)] for p in (own, other)]
        rows = [[unit(row) for row in side] for side in z]
        columns = [[unit([row[k] for row in side]) for k in range(4)] for side in z]
        a = sum(((rows[0][n][k] - rows[1][n][k]).square() for n in range(7) for k in range(4)), ZERO) / 7
        b = (
            sum(((columns[0][k][n] - columns[1][k][n]).square() for n in range(7) for k in range(4)), ZERO)
            / 4
        )
        g = ZERO
        for k in range(4):
            for m in range(4):
                r = [sum((x * y for x, y in zip(side[k], side[m], strict=True)), ZERO) for side in columns]
                g = g + (r[0] - r[1]).square() / 16
        return 7 * (0.5 * a + 2 * b + 3 * g)

    assert_follows("clkd", expected, seen_case(), classes=4, row=0.5, column=2.0, between=3.0)


def test_student_that_ranks_as_the_teacher_does_has_nothing_to_learn_from_its_correlations() -> None:
    seen = seen_case()
    same = seen_case(student=seen.live._replace(hidden_ND=seen.live.hidden_ND.clone().requires_grad_()))
    assert float(clkd(same).detach()) == pytest.approx(0, abs=1e-12)


def test_relations_need_no_common_width_or_vocabulary() -> None:
    student, teacher = torch.randn(6, 4), torch.randn(6, 11)
    assert float(relation_kl(student, teacher, 0.1)) > 0
    turned = torch.cat([student, torch.zeros(6, 7)], 1)
    assert float(relation_kl(student, 5 * turned, 0.1)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_no_rows_are_a_sum_of_zero_that_can_be_differentiated(name: str) -> None:
    seen = seen_case(0, learns=name)
    value = TERMS[name].function(seen)
    assert float(value.detach()) == 0
    assert value.requires_grad
    torch.autograd.grad(value, seen.student.hidden_ND, allow_unused=True)


@pytest.mark.parametrize("num_rows", [0, 1, 300, 600])
@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if term.learns])
def test_what_is_learned_is_called_as_often_on_every_rank_and_has_a_gradient(
    name: str, num_rows: int
) -> None:
    """Of ZeRO-3 each call is a collective; of a rank with no or few rows no parameter may lack its gradient."""
    seen, calls = seen_case(num_rows, learns=name), []
    for module in seen.learned[name].modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    value = TERMS[name].function(seen)
    layers = 2 if name == "hidden_square" else 1  # one module for all layers of the student
    assert all(calls.count(module) == layers for module in seen.learned[name].modules())
    for gradient in torch.autograd.grad(value, list(seen.learned[name].parameters())):
        assert gradient.isfinite().all()
        assert num_rows or not gradient.any()


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if not term.stored])
def test_stored_targets_can_not_serve_a_term_that_reads_hidden_states(name: str) -> None:
    if name == "clkd":
        pytest.skip("it would be served if targets kept the same classes of all rows")
    with pytest.raises(ValueError, match="hidden states of one live teacher"):
        TERMS[name].function(seen_case(stored=True, learns=name))


@pytest.mark.parametrize(
    "name", [name for name in IN_ANY_RUN if name != "kdiga"]
)  # it needs a graph: see its own tests
def test_term_in_bf16_is_near_that_in_float64(name: str) -> None:
    exact = seen_case(6, learns=name)
    torch.manual_seed(2)
    expected = float(TERMS[name].function(exact).detach())
    low = to_bf16(exact)
    torch.manual_seed(2)
    assert float(TERMS[name].function(low).detach()) == pytest.approx(expected, rel=0.1, abs=0.05)


def to_bf16(seen: Seen) -> Seen:
    from dataclasses import replace

    def rows(r: Rows) -> Rows:
        layers, attentions, mixed, *_ = r.inside
        both = (tuple(x.detach().bfloat16() for x in each) for each in (layers, attentions))
        inside = type(r.inside)(*both, None if mixed is None else mixed.detach().bfloat16())
        head = r.head._replace(
            weight_VD=r.head.weight_VD.detach().bfloat16(), bias_V=r.head.bias_V.bfloat16()
        )  # type: ignore
        return Rows(r.hidden_ND.detach().bfloat16(), head, inside)

    for module in seen.learned.values():
        module.bfloat16()
    return replace(seen, student=rows(seen.student), teacher=rows(seen.live))
