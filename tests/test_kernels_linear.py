"""Heads and divergence in one operation: the numbers of doing one after the other, in a fraction of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_truth import SETTINGS
from linear_case import Case, N, V, all_of
from torch import Tensor
from watch import Watch

from distill import hardware
from distill.kernels import (
    Head,
    cpu,
    linear_divergence,
    linear_sparse_divergence,
    sparse_divergence,
)
from distill.kernels.linear import rows_at_once
from distill.kernels.terms import resolve_terms

has_cpu = pytest.mark.skipif(bool(cpu.load_problem), reason=cpu.load_problem or "built")
IMPLS = ["reference", pytest.param("cpu", marks=has_cpu)]
EVERY_KIND = [{"kind": kind, **settings} for kind in SETTINGS for settings in SETTINGS[kind]]
SOFT_AND_HARD: dict[str, Any] = {"soft_weight": 0.7, "hard_weight": 0.3, "temperature": 2.0}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ same numbers


@pytest.mark.parametrize("settings", EVERY_KIND, ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_every_kind_is_what_head_and_divergence_give_in_float64(
    settings: dict[str, Any], softcap: float | None
) -> None:
    case = Case(softcap=softcap)
    expected = all_of(case, case.one_after_the_other(**settings))
    found = all_of(case, case.fused(chunk_rows=7, impl="reference", **settings))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 25, 49, 50, 1024, None])
def test_chunks_give_the_same_as_all_rows_at_once(impl: Any, bias: bool, chunk_rows: int | None) -> None:
    case = Case(dtype=torch.float32, bias=bias)
    expected = all_of(case, case.one_after_the_other(**SOFT_AND_HARD))
    found = all_of(case, case.fused(chunk_rows=chunk_rows, impl=impl, **SOFT_AND_HARD))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("gold", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_sparse_targets_are_cut_into_chunks_with_their_rows(impl: Any, gold: bool) -> None:
    case = Case(dtype=torch.float32)
    common = {"vocab_size": V, "hard_weight": 0.3}
    with torch.no_grad():
        targets = case.targets(gold)
    whole = sparse_divergence(
        case.head(case.student), targets, case.labels, case.weights, impl="reference", **common
    )
    fused = linear_sparse_divergence(
        case.student, case.head, targets, case.labels, case.weights, chunk_rows=7, impl=impl, **common
    )
    torch.testing.assert_close(all_of(case, fused), all_of(case, whole), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_are_the_slopes_of_the_loss(softcap: float | None) -> None:
    """By central differences; torch's gradcheck would run backward twice."""
    case, step = Case(softcap=softcap), 1e-6
    gradients = torch.autograd.grad(case.fused(chunk_rows=7, **SOFT_AND_HARD).loss, case.inputs())
    for tensor, gradient in zip(case.inputs(), gradients, strict=True):
        direction, losses = torch.randn_like(tensor), []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
                losses.append(case.fused(chunk_rows=7, **SOFT_AND_HARD).loss.item())
                tensor -= sign * step * direction
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_without_a_teacher_only_labels_teach() -> None:
    case = Case()
    found = linear_divergence(
        case.student, case.head, None, None, case.labels, soft_weight=0.0, hard_weight=1.0, chunk_rows=16
    )
    assert (found.soft.item(), found.soft_ce.item()) == (0.0, 0.0)
    assert found.loss.item() == pytest.approx(found.hard.item())


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_zero_and_zero_gradients(impl: Any) -> None:
    case = Case(rows=0, dtype=torch.float32)
    found = all_of(case, case.fused(impl=impl))
    assert all(part.count_nonzero() == 0 for part in found)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_the_same_bits(impl: Any) -> None:
    case = Case(dtype=torch.float32)
    one, other = (all_of(case, case.fused(chunk_rows=7, impl=impl)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------ precision


def worst(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("emulated", [False, True], ids=["16-bit products", "float32 products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_error_is_within_that_of_logits_in_the_working_dtype(
    impl: Any, dtype: torch.dtype, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, and d loss / d hidden, weight, bias, over several chunks whose sum must not round."""
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda dtype: dtype == torch.float32 or not emulated)
    case = Case(rows=96, classes=257, width=16, dtype=dtype, softcap=20.0)
    exact = case.to(torch.float64)
    truth = all_of(exact, exact.one_after_the_other(**SOFT_AND_HARD))
    naive = all_of(case, case.one_after_the_other(**SOFT_AND_HARD))
    found = all_of(case, case.fused(chunk_rows=16, impl=impl, **SOFT_AND_HARD))
    rounding = 2 * torch.finfo(dtype).eps
    for a, b, t in zip(found, naive, truth, strict=True):
        assert worst(a, t) <= worst(b, t) + rounding


def test_weight_gradient_keeps_what_16_bits_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 chunks that add 1 / 256 of the sum each: in bfloat16 the later ones would vanish."""
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda dtype: True)
    case = Case(rows=1024, dtype=torch.bfloat16)
    case.student = case.student[:1].detach().repeat(1024, 1).requires_grad_()
    case.labels = case.labels[:1].repeat(1024)
    keywords: dict[str, Any] = {"soft_weight": 0.0, "hard_weight": 1.0, "vocab_size": V}
    fused = linear_divergence(case.student, case.head, None, None, case.labels, chunk_rows=4, **keywords)
    exact = case.to(torch.float64)
    whole = linear_divergence(exact.student, exact.head, None, None, exact.labels, **keywords)
    found, truth = (all_of(c, r)[7] for c, r in ((case, fused), (exact, whole)))
    assert found.dtype == torch.bfloat16
    assert worst(found, truth) < 2 * torch.finfo(torch.bfloat16).eps


# ------------------------------------------------------------------------------------------------ memory and work


def large(**changes: Any) -> Case:
    return Case(rows=1024, classes=4096, width=8, dtype=torch.float32, **changes)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_logits_of_more_rows_than_a_chunk_are_ever_made(impl: Any, softcap: float | None) -> None:
    case = large(softcap=softcap)
    with Watch(case.classes) as watch:
        case.fused(chunk_rows=64, impl=impl, **SOFT_AND_HARD).loss.backward()
    assert 0 < watch.most_rows <= 64


@has_cpu
def test_memory_is_a_chunk_of_logits_each_and_the_gradients() -> None:
    case = large()
    chunk, logits = (rows * 4096 * 4 for rows in (64, 1024))
    gradients = 4 * sum(tensor.numel() for tensor in case.inputs())
    with Watch(V) as watch:
        case.fused(chunk_rows=64, impl="cpu", **SOFT_AND_HARD).loss.backward()
    assert watch.peak_bytes < 1.2 * (2 * chunk + gradients) < logits / 4
    with Watch(V) as watch:
        case.one_after_the_other(**SOFT_AND_HARD).loss.backward()
    assert watch.peak_bytes > 4 * logits


def products_of(case: Case, *, teacher: bool = True, grad: bool = True) -> int:
    """Matrix products of a pass over two chunks."""
    against = (case.teacher, case.teacher_head) if teacher else (None, None)
    keywords = SOFT_AND_HARD if teacher else {"soft_weight": 0.0, "hard_weight": 1.0}
    with Watch(V) as watch, torch.set_grad_enabled(grad):
        linear_divergence(
            case.student, case.head, *against, case.labels, vocab_size=V, chunk_rows=25, **keywords
        )
    return watch.num_products


def test_only_gradients_that_somebody_needs_are_made() -> None:
    case = Case()
    assert products_of(case) == 2 * 4
    assert products_of(case, teacher=False) == 2 * 3
    assert products_of(case, grad=False) == 2 * 2
    assert products_of(case, teacher=False, grad=False) == 2 * 1
    case.head.weight_VD.requires_grad_(False)
    assert products_of(case) == 2 * 3
    frozen = case.fused(chunk_rows=25)
    assert torch.autograd.grad(frozen.loss, case.student)[0].shape == (N, 6)


def test_teacher_gets_no_gradient() -> None:
    case = Case()
    case.teacher.requires_grad_()
    case.teacher_head.weight_VD.requires_grad_()
    case.fused().loss.backward()
    assert case.teacher.grad is None and case.teacher_head.weight_VD.grad is None


def test_rows_of_padding_have_zero_gradient() -> None:
    case = Case()
    case.fused(chunk_rows=7).loss.backward()
    for tensor in case.inputs()[1:]:
        assert tensor.grad is not None
        assert tensor.grad[V:].count_nonzero() == 0 and tensor.grad[:V].count_nonzero() > 0


def test_host_never_waits_for_a_value() -> None:
    """On the meta device there are no values to wait for: reading one is an error."""
    case = Case(dtype=torch.float32, softcap=3.0)
    meta = case.to(torch.float32)
    for name in ("student", "teacher", "labels", "weights"):
        setattr(meta, name, getattr(meta, name).detach().to("meta"))
    for name in ("head", "teacher_head"):
        weight, bias, softcap = getattr(meta, name)
        setattr(meta, name, Head(weight.detach().to("meta"), bias.detach().to("meta"), softcap))
    meta.require_grad()
    meta.fused(chunk_rows=7, impl="reference", **SOFT_AND_HARD).loss.backward()
    assert meta.student.grad is not None and meta.student.grad.is_meta


@pytest.mark.parametrize(
    ("device", "rows", "vocab_size", "expected"),
    [
        ("cpu", 10**6, 32000, 512),
        ("cpu", 100, 32000, 100),
        ("meta", 10**6, 32000, 4096),
        ("meta", 10**6, 128256, 2048),
        ("meta", 10**6, 10**9, 128),
        ("cpu", 0, 17, 1),
    ],
)
def test_rows_of_a_chunk_follow_device_and_vocabulary(
    device: str, rows: int, vocab_size: int, expected: int
) -> None:
    hidden = torch.empty(rows, 1, dtype=torch.bfloat16, device=device)
    terms = resolve_terms(
        kind="forward_kl", beta=0.5, soft_weight=1.0, hard_weight=0.0, temperature=1.0,
        temperature_on="teacher", temperature_squared=False, vocab_size=vocab_size,
    )  # fmt: skip
    assert rows_at_once(hidden, terms, None) == expected


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_do_not_count_may_hold_anything(impl: Any, poison: float, softcap: float | None) -> None:
    case = Case(dtype=torch.float32, softcap=softcap)
    clean = all_of(case, case.fused(chunk_rows=7, impl=impl, **SOFT_AND_HARD))
    with torch.no_grad():
        case.student[1::3] = poison
        case.teacher[1::3] = poison
    dirty = all_of(case, case.fused(chunk_rows=7, impl=impl, **SOFT_AND_HARD))
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_row_that_counts_is_a_nan_loss_and_gradient(impl: Any) -> None:
    case = Case(dtype=torch.float32)
    with torch.no_grad():
        case.student[0, 0] = float("nan")
    found = all_of(case, case.fused(chunk_rows=7, impl=impl))
    assert found[0].isnan() and found[7].isnan().any()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_backward_runs_once_and_says_so(factor: float) -> None:
    loss = factor * Case().fused().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore")  # of torch, about itself where one graph ends and the next begins
def test_compiled_code_around_it_gives_the_same() -> None:
    case = Case(dtype=torch.float32)

    def scaled(student: Tensor) -> Tensor:
        return (
            2 * linear_divergence(2 * student, case.head, case.teacher, case.teacher_head, vocab_size=V).loss
        )

    expected, found = scaled(case.student), torch.compile(scaled, backend="eager")(case.student)
    gradients = (torch.autograd.grad(loss, case.inputs()) for loss in (expected, found))
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def with_head(**changes: Any) -> Case:
    case = Case()
    case.head = case.head._replace(**changes)
    return case


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="chunk_rows must be a whole number of at least 1, got 0"):
        case.fused(chunk_rows=0)
    with pytest.raises(ValueError, match="must be given together"):
        linear_divergence(case.student, case.head, case.teacher, None, case.labels)
    with pytest.raises(ValueError, match="student has 37 columns, teacher 35: give vocab_size"):
        linear_divergence(case.student, case.head, case.teacher, case.teacher_head, case.labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \[50\], got torch.int64 \(49,\)"):
        linear_divergence(case.student, case.head, None, None, case.labels[1:], soft_weight=0.0)
    with pytest.raises(ValueError, match=r"student_hidden_ND must be a floating tensor \[N, D\]"):
        linear_divergence(case.labels, case.head, None, None, soft_weight=0.0)
    wanted = r"student_head.weight_VD must be torch.float64 \[37, 6\] on cpu, as the hidden states are, got "
    for weight, found in (
        (torch.zeros(37, 7, dtype=torch.float64), r"torch.float64 \[37, 7\] on cpu"),
        (torch.zeros(37, 6), r"torch.float32 \[37, 6\] on cpu"),
        (torch.zeros(37, 6, dtype=torch.float64, device="meta"), r"torch.float64 \[37, 6\] on meta"),
    ):
        with pytest.raises(ValueError, match=wanted + found):
            with_head(weight_VD=weight).fused()
    with pytest.raises(ValueError, match=r"student_head.bias_V must be torch.float64 \[37\] on cpu"):
        with_head(bias_V=torch.zeros(3, dtype=torch.float64)).fused()
    with pytest.raises(
        ValueError, match="student_head.softcap must be a finite number above 0 or None, got 0"
    ):
        with_head(softcap=0.0).fused()
    with pytest.raises(ValueError, match="teacher_head.weight_VD must be"):
        linear_divergence(case.student, case.head, case.teacher, case.head, case.labels)
