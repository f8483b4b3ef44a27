"""Every implementation against float64, with the error of the naive computation as budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_truth import SETTINGS, assert_true_to_float64, make_case, top_k_targets

from distill.kernels import cpu, divergence, sparse_divergence

IMPLS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu.load_problem), reason=cpu.load_problem or "built")),
    pytest.param("triton", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [*itertools.product((0, 1, 7, 33), (1, 2, 17, 1000, 1001, 4097)), (3, 32000), (2, 50257)]


def device_of(impl: str) -> str:
    return "cuda" if impl == "triton" else "cpu"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("N, V", SHAPES)
def test_error_is_within_the_naive_error_and_rounding(
    impl: str, dtype: torch.dtype, kind: str, N: int, V: int
) -> None:
    for number, settings in enumerate(SETTINGS[kind]):
        case = make_case(N, V, dtype, weighted=number % 2 == 1, device=device_of(impl))
        assert_true_to_float64(case, {"kind": kind, **settings}, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [False, True], ids=["cut off", "with tail"])
@pytest.mark.parametrize("N, V, K", [(7, 2, 1), (33, 17, 5), (33, 1001, 64), (7, 4097, 50), (3, 32000, 64)])
def test_error_with_sparse_targets_is_within_the_naive_error_and_rounding(
    impl: str, dtype: torch.dtype, tail: bool, N: int, V: int, K: int
) -> None:
    for number, settings in enumerate(SETTINGS["forward_kl"]):
        if settings.get("temperature", 1.0) < 1e-4:
            continue
        case = make_case(N, V, dtype, weighted=number % 2 == 1, device=device_of(impl))
        assert_true_to_float64(case, settings, impl, top_k_targets(case, K, tail=tail))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("teacher", ["one-hot", "uniform", "equal"])
def test_error_is_within_budget_for_extreme_teachers(impl: str, kind: str, teacher: str) -> None:
    if (kind, teacher) == ("tvd", "equal"):
        pytest.skip("the kink of |p - q|: rounding chooses the gradient")
    for settings, dtype in itertools.product(SETTINGS[kind], DTYPES):
        case = make_case(7, 1001, dtype, device=device_of(impl))
        if teacher == "one-hot":
            case.teacher.fill_(-60.0)
            case.teacher[torch.arange(7), torch.arange(7) * 9] = 60.0
        elif teacher == "uniform":
            case.teacher.fill_(0.5)
        else:
            case.teacher.copy_(case.student)
        assert_true_to_float64(case, {"kind": kind, **settings}, impl)


@pytest.mark.parametrize("kind", SETTINGS)
def test_reference_passes_gradcheck_in_float64(kind: str) -> None:
    case = make_case(4, 7, torch.float64, weighted=True)
    for settings in SETTINGS[kind]:
        keywords: dict[str, Any] = {"kind": kind, "vocab_size": 7, **settings}
        assert torch.autograd.gradcheck(
            lambda s, k=keywords: divergence(s, case.teacher, case.labels, case.weights, **k).loss,
            case.student.clone().requires_grad_(),
        )


def test_reference_passes_gradcheck_with_sparse_targets() -> None:
    case = make_case(4, 7, torch.float64, weighted=True)
    for tail in (False, True):
        targets = top_k_targets(case, 3, tail=tail)
        assert torch.autograd.gradcheck(
            lambda s, t=targets: (
                sparse_divergence(s, t, case.labels, case.weights, hard_weight=0.3, vocab_size=7).loss
            ),
            case.student.clone().requires_grad_(),
        )
