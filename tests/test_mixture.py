"""Several heads as one teacher: the probabilities of a mixture, in the fused pass as in float64 written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_case import Case, N, V, head_of
from torch import Tensor

from distill.head import Head, Mixture
from distill.kernels import cpu, divergence, linear_divergence

WIDTHS = (6, 10, 3)
has_cpu = pytest.mark.skipif(bool(cpu.load_problem), reason=cpu.load_problem or "built")
IMPLS = ["reference", pytest.param("cpu", marks=has_cpu)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def members(dtype: torch.dtype, softcap: float | None = None, extra: int = 3) -> tuple[list[Tensor], Mixture]:
    """Hidden states and heads of three models, the last without a bias; rows of padding that would win if read."""
    hidden = [torch.randn(N, width).to(dtype) for width in WIDTHS]
    heads = tuple(head_of(width, V + extra, width > 3, softcap, dtype) for width in WIDTHS)
    for head in heads:
        head.weight_VD[V:] = 50.0
    return hidden, Mixture(heads, V)


def side_by_side(hidden: list[Tensor], log_weights_NM: Tensor) -> Tensor:
    return torch.cat([*hidden, log_weights_NM.to(hidden[0].dtype)], dim=1)


def written_out(hidden: list[Tensor], mixture: Mixture, log_weights_NM: Tensor) -> Tensor:
    """log sum_m w_m p_m, row by row and class by class."""
    rows = []
    for n in range(len(log_weights_NM)):
        mass = [math.exp(float(log_weights_NM[n, m])) for m in range(len(hidden))]
        mean = torch.zeros(mixture.vocab_size, dtype=torch.float64)
        for m, (weight_VD, bias_V, softcap) in enumerate(mixture.heads):
            logits = weight_VD.double()[: mixture.vocab_size] @ hidden[m][n].double()
            logits = logits if bias_V is None else logits + bias_V.double()[: mixture.vocab_size]
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            mean += mass[m] / sum(mass) * logits.exp() / logits.exp().sum()
        rows.append(mean.log())
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_mixture_says_the_weighted_mean_of_its_members_probabilities(softcap: float | None) -> None:
    hidden, mixture = members(torch.float64, softcap)
    log_weights = torch.randn(N, 3, dtype=torch.float64)
    found = mixture(side_by_side(hidden, log_weights))
    torch.testing.assert_close(found, written_out(hidden, mixture, log_weights), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "forward_kl", "temperature": 2.0},
        {"kind": "forward_kl", "temperature": 0.0},
        {"kind": "reverse_kl"},
        {"kind": "jsd", "beta": 0.3},
        {"kind": "tvd"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
@pytest.mark.parametrize("chunk_rows", [7, None])
def test_the_fused_pass_from_a_mixture_is_the_divergence_from_its_logits(
    impl: Any, settings: dict[str, Any], chunk_rows: int | None
) -> None:
    case = Case(dtype=torch.float32)
    hidden, mixture = members(torch.float32)
    log_weights = torch.randn(N, 3)
    both = {"soft_weight": 0.7, "hard_weight": 0.3, "vocab_size": V, **settings}
    found = linear_divergence(
        case.student, case.head, side_by_side(hidden, log_weights), mixture, case.labels,
        chunk_rows=chunk_rows, impl=impl, **both,
    )  # fmt: skip
    grads = torch.autograd.grad(found.loss, case.inputs())
    wide = case.to(torch.float64)
    teacher_NV = written_out(hidden, mixture, log_weights)
    expected = divergence(wide.head(wide.student)[:, :V], teacher_NV, wide.labels, impl="reference", **both)
    for name in ("loss", "soft", "soft_ce", "hard", "num_correct", "num_rows"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name).double(), rtol=2e-5, atol=2e-5
        )
    for grad, truth in zip(grads, torch.autograd.grad(expected.loss, wide.inputs()), strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=2e-4, atol=2e-5)


def test_a_mixture_of_one_teaches_as_its_member(dtype: torch.dtype = torch.float32) -> None:
    case = Case(dtype=dtype)
    alone = Mixture((case.teacher_head,), V)
    weights = torch.zeros(N, 1)
    mixed = linear_divergence(
        case.student, case.head, side_by_side([case.teacher], weights), alone, vocab_size=V
    )
    single = linear_divergence(case.student, case.head, case.teacher, case.teacher_head, vocab_size=V)
    torch.testing.assert_close(mixed.soft, single.soft, rtol=1e-5, atol=1e-5)


def test_a_member_of_weight_0_says_nothing_even_if_it_is_sure_of_another_class() -> None:
    hidden, mixture = members(torch.float32)
    hidden[1] *= 100.0
    log_weights = torch.tensor([[0.0, -math.inf, 0.0]]).expand(N, 3)
    without = Mixture((mixture.heads[0], mixture.heads[2]), V)
    expected = without(side_by_side([hidden[0], hidden[2]], torch.zeros(N, 2)))
    torch.testing.assert_close(mixture(side_by_side(hidden, log_weights)), expected)


def test_16_bit_members_are_mixed_in_float32() -> None:
    hidden, mixture = members(torch.bfloat16)
    log_weights = torch.zeros(N, 3)
    found = mixture(side_by_side(hidden, log_weights))
    assert found.dtype == torch.float32
    truth = written_out(hidden, mixture, log_weights)
    naive = torch.stack(
        [head(h)[:, :V].float().softmax(1) for head, h in zip(mixture.heads, hidden, strict=True)]
    )
    budget = (naive.mean(0).log().double() - truth).abs().max()  # the members' logits are bf16
    assert (found.double() - truth).abs().max() <= budget + 1e-5


def test_what_does_not_fit_a_mixture_is_refused_with_what_was_got() -> None:
    case = Case(dtype=torch.float32)
    hidden, mixture = members(torch.float32)
    without_weights = torch.cat(hidden, dim=1)
    with pytest.raises(ValueError, match=r"must be \[N, 22\], got torch.float32 \(50, 19\)"):
        linear_divergence(case.student, case.head, without_weights, mixture, vocab_size=V)
    small = Mixture((*mixture.heads[:2], Head(torch.randn(V - 1, 3))), V)
    with pytest.raises(ValueError, match=f"member 2 has {V - 1} classes, the mixture {V}"):
        linear_divergence(
            case.student, case.head, side_by_side(hidden, torch.zeros(N, 3)), small, vocab_size=V
        )
