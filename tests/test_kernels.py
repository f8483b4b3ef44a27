"""What holds for every implementation beside precision: sums and counts, edges, refusals, who serves."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_truth import SETTINGS, largest, loss_and_grad
from torch import Tensor

from distill.kernels import SparseTargets, cpu, divergence, picker, reference, sparse_divergence

has_cpu = pytest.mark.skipif(bool(cpu.load_problem), reason=cpu.load_problem or "built")
IMPLS = ["reference", pytest.param("cpu", marks=has_cpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_KIND = [{"kind": kind, **settings} for kind in SETTINGS for settings in SETTINGS[kind]]


def logits_of(N: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (torch.randn(N, V) * scale).to(dtype)


def labels_of(N: int, V: int) -> Tensor:
    labels = torch.randint(0, V, (N,))
    labels[1::3] = -100
    return labels


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature_on", ["teacher", "both"])
def test_kl_of_the_student_with_itself_is_zero(impl: Any, dtype: torch.dtype, temperature_on: Any) -> None:
    student = logits_of(9, 1001, dtype, scale=8).requires_grad_()
    temperature = 3.0 if temperature_on == "both" else 1.0
    result = divergence(
        student, student, None, temperature=temperature, temperature_on=temperature_on, impl=impl
    )
    result.loss.backward()
    assert abs(result.soft.item()) <= 1e-6 and abs(result.loss.item()) <= 1e-6
    assert student.grad is not None and largest(student.grad) <= 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.0, 1e-20, 9e-5])
def test_hard_labels_equal_a_cold_teacher_that_is_always_right(impl: Any, temperature: float) -> None:
    student, labels = logits_of(12, 50), labels_of(12, 50)
    teacher = logits_of(12, 50)
    teacher[torch.arange(12), labels.clamp(min=0)] = 20.0

    def cold(x: Tensor) -> Tensor:
        return divergence(x, teacher, labels, temperature=temperature, impl=impl).loss

    def hard(x: Tensor) -> Tensor:
        return divergence(x, None, labels, soft_weight=0.0, hard_weight=1.0, impl=impl).loss

    for a, b in zip(loss_and_grad(cold, student), loss_and_grad(hard, student), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_are_sums_over_counted_rows_without_weights(impl: Any) -> None:
    student, teacher, labels = logits_of(10, 40), logits_of(10, 40), labels_of(10, 40)
    labels[0] = student[0].argmax()
    result = divergence(
        student, teacher, labels, soft_weight=0.25, hard_weight=2.0, temperature=2.0,
        temperature_squared=True, impl=impl,
    )  # fmt: skip
    keep = labels != -100
    log_p, q = torch.log_softmax(student[keep], -1), torch.softmax(teacher[keep] / 2.0, -1)
    assert result.soft.item() == pytest.approx(F.kl_div(log_p, q, reduction="sum").item(), rel=1e-5)
    assert result.soft_ce.item() == pytest.approx(-(q * log_p).sum().item(), rel=1e-5)
    assert result.hard.item() == pytest.approx(
        F.nll_loss(log_p, labels[keep], reduction="sum").item(), rel=1e-5
    )
    assert result.loss.item() == pytest.approx(
        0.25 * 4 * result.soft.item() + 2 * result.hard.item(), rel=1e-5
    )
    assert result.num_rows.item() == keep.sum().item()
    assert result.num_correct.item() == (student.argmax(-1) == labels).sum().item() > 0
    for part in result:
        assert part.dim() == 0 and not part.requires_grad
    assert result.num_rows.dtype == result.num_correct.dtype == torch.int64


@pytest.mark.parametrize("impl", IMPLS)
def test_without_labels_every_row_counts_and_label_parts_are_zero(impl: Any) -> None:
    student, teacher = logits_of(5, 30), logits_of(5, 30)
    result = divergence(student, teacher, None, impl=impl)
    assert (result.num_rows.item(), result.num_correct.item(), result.hard.item()) == (5, 0, 0.0)
    assert result.soft.item() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_of_equal_logits_is_the_arg_max(impl: Any) -> None:
    student = torch.zeros(2, 5)
    result = divergence(student, torch.zeros(2, 5), torch.tensor([0, 1]), temperature=0.0, impl=impl)
    assert result.num_correct.item() == 1
    leaf = student.clone().requires_grad_()
    divergence(leaf, torch.zeros(2, 5), None, temperature=0.0, impl=impl).loss.backward()
    assert leaf.grad is not None and (leaf.grad.argmin(-1) == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("settings", EVERY_KIND, ids=str)
def test_infinite_and_huge_logits_stay_exact(impl: Any, settings: dict[str, Any]) -> None:
    student, teacher, labels = logits_of(6, 20), logits_of(6, 20), torch.arange(6)
    student[0], teacher[0] = student[0] + 1e4, teacher[0] - 1e4
    student[1, 3], teacher[1, 4] = 1e4, 1e4
    student[2, 10:], teacher[2, 10:] = -torch.inf, -torch.inf  # a smaller vocabulary on both sides
    if settings["kind"] != "reverse_kl":  # which is infinite there
        teacher[3, 5:] = -torch.inf
    if settings["kind"] not in ("forward_kl", "reverse_kl"):
        student[4, 7:] = -torch.inf

    def loss(x: Tensor, t: Tensor, which: str) -> Tensor:
        return divergence(x, t, labels, impl=which, **settings).loss  # type: ignore[arg-type]

    truth, true_grad = loss_and_grad(lambda x: loss(x, teacher.double(), "reference"), student.double())
    found, grad = loss_and_grad(lambda x: loss(x, teacher, impl), student)
    assert found.item() == pytest.approx(truth.item(), rel=1e-6)
    assert largest(grad - true_grad) <= 1e-6 * (1 + largest(true_grad))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("settings", EVERY_KIND, ids=str)
def test_columns_of_minus_infinity_on_both_sides_are_as_if_absent(
    impl: Any, settings: dict[str, Any]
) -> None:
    student, teacher, labels = logits_of(6, 20), logits_of(6, 20), torch.arange(6)
    student[:, 10:], teacher[:, 10:] = -torch.inf, -torch.inf

    def run(width: int) -> tuple[Tensor, Tensor]:
        cut = teacher[:, :width]
        return loss_and_grad(
            lambda x: divergence(x, cut, labels, impl=impl, **settings).loss, student[:, :width]
        )

    (loss, grad), (expected, expected_grad) = run(20), run(10)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest(grad[:, 10:]) == 0 and largest(grad[:, :10] - expected_grad) <= 1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_what_the_teacher_expects_and_the_student_excludes_costs_infinitely(impl: Any) -> None:
    student, teacher = logits_of(3, 20), logits_of(3, 20)
    student[1, 4] = -torch.inf
    assert divergence(student, teacher, impl=impl).loss == torch.inf
    assert divergence(student, teacher, kind="jsd", impl=impl).loss.isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_logit_makes_the_loss_nan_instead_of_passing_unseen(impl: Any, bad: float) -> None:
    for broken in range(2):
        pair = [logits_of(4, 1001), logits_of(4, 1001)]
        pair[broken][2, 500] = bad
        for settings in EVERY_KIND:
            if settings.get("soft_weight", 1.0):
                labels = torch.zeros(4).long()
                assert divergence(*pair, labels, impl=impl, **settings).loss.isnan(), settings


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_nothing_but_minus_infinity_makes_the_loss_nan(impl: Any) -> None:
    for broken in range(2):
        pair = [logits_of(4, 33), logits_of(4, 33)]
        pair[broken][2] = -torch.inf
        for settings in EVERY_KIND:
            if settings.get("soft_weight", 1.0):
                assert divergence(*pair, torch.zeros(4).long(), impl=impl, **settings).loss.isnan(), settings


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_enter_the_loss_alone_and_a_row_of_weight_zero_may_be_infinite(impl: Any) -> None:
    student, teacher, weights = logits_of(4, 9), logits_of(4, 9), torch.tensor([0.5, 0.0, 2.0, 1.0])
    student[1, 3] = -torch.inf
    leaf = student.clone().requires_grad_()
    result = divergence(leaf, teacher, torch.zeros(4).long(), weights, hard_weight=0.5, impl=impl)
    alone = [
        divergence(student[[i]], teacher[[i]], torch.zeros(1).long(), hard_weight=0.5, impl=impl).loss
        for i in (0, 2, 3)
    ]
    assert result.loss.item() == pytest.approx((0.5 * alone[0] + 2 * alone[1] + alone[2]).item(), rel=1e-6)
    assert (result.soft.item(), result.num_rows.item()) == (torch.inf, 4)
    result.loss.backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and largest(leaf.grad[1]) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_all_rows_ignored_is_a_loss_of_zero(impl: Any) -> None:
    student = torch.full((3, 9), torch.nan).requires_grad_()
    result = divergence(
        student, torch.full((3, 9), torch.nan), torch.full((3,), -100), hard_weight=1.0, impl=impl
    )
    result.loss.backward()
    assert [float(x.detach()) for x in result] == [0.0] * 6
    assert student.grad is not None and largest(student.grad) == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", EVERY_KIND, ids=str)
def test_in_place_the_logits_become_the_same_gradient(impl: Any, dtype: torch.dtype, settings: Any) -> None:
    student, teacher, labels = logits_of(7, 1001, dtype), logits_of(7, 1001, dtype), labels_of(7, 1001)

    def run(in_place: bool) -> list[Tensor]:
        leaf = student.clone().requires_grad_()
        result = divergence(leaf * 1, teacher, labels, in_place=in_place, impl=impl, **settings)
        result.loss.backward()
        assert leaf.grad is not None
        return [leaf.grad, *result]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_in_place_is_refused_for_leaves_and_noticed_by_whoever_needs_the_logits() -> None:
    leaf, teacher = logits_of(3, 9).requires_grad_(), logits_of(3, 9)
    with pytest.raises(ValueError, match="leaf"):
        divergence(leaf, teacher, in_place=True)


@has_cpu
def test_logits_that_another_operation_saved_are_not_silently_overwritten() -> None:
    leaf, teacher = logits_of(3, 9).requires_grad_(), logits_of(3, 9)
    logits = leaf.exp()  # whose backward needs its result
    loss = divergence(logits, teacher, in_place=True, impl="cpu").loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_ends_of_beta_are_the_two_kl_divergences(impl: Any) -> None:
    student, teacher = logits_of(5, 30), logits_of(5, 30)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        ends = divergence(student, teacher, kind="jsd", beta=beta, impl=impl)
        assert torch.equal(ends.loss, divergence(student, teacher, kind=kind, impl=impl).loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_all_classes_as_sparse_targets_equal_the_whole_teacher(impl: Any) -> None:
    student, teacher, labels = logits_of(5, 30), logits_of(5, 30), labels_of(5, 30)
    order = torch.stack([torch.randperm(30) for _ in range(5)])
    targets = SparseTargets(order, teacher.softmax(-1).gather(1, order))
    whole = loss_and_grad(lambda x: divergence(x, teacher, labels, impl=impl).loss, student)
    sparse = loss_and_grad(lambda x: sparse_divergence(x, targets, labels, impl=impl).loss, student)
    for a, b in zip(sparse, whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gold_probability_is_one_more_entry_unless_the_label_is_kept(impl: Any) -> None:
    student, labels = logits_of(2, 9), torch.tensor([5, 1])
    ids, probs = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[0.5, 0.2], [0.5, 0.2]])
    targets = SparseTargets(ids, probs, torch.tensor([0.3, 0.3]), torch.tensor([0.1, 0.5]))
    written = SparseTargets(
        torch.tensor([[1, 2, 5], [1, 2, 0]]),
        torch.tensor([[0.5, 0.2, 0.1], [0.5, 0.2, 0.0]]),
        torch.tensor([0.2, 0.3]),
    )
    found = loss_and_grad(lambda x: sparse_divergence(x, targets, labels, impl=impl).loss, student)
    truth = loss_and_grad(lambda x: sparse_divergence(x, written, labels, impl=impl).loss, student)
    for a, b in zip(found, truth, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_sparse_entries_of_probability_zero_are_padding_and_a_broken_one_makes_the_loss_nan(
    impl: Any,
) -> None:
    student = logits_of(2, 9)
    padded = SparseTargets(torch.tensor([[1, 4], [-1, 99]]), torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    result = sparse_divergence(student, padded, impl=impl)
    alone = sparse_divergence(student[:1], SparseTargets(*(x[:1] for x in padded[:2])), impl=impl)
    assert result.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)
    padded.probs_NK[0, 0] = torch.nan
    assert sparse_divergence(student, padded, impl=impl).loss.isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_do_not_count_may_hold_anything(impl: Any) -> None:
    student, teacher, labels = logits_of(4, 9), logits_of(4, 9), torch.tensor([1, -100, 2, -100])
    clean = divergence(student[::2], teacher[::2], labels[::2], hard_weight=0.5, impl=impl)
    student[1::2], teacher[1::2] = torch.nan, torch.inf
    leaf = student.clone().requires_grad_()
    result = divergence(leaf, teacher, labels, hard_weight=0.5, impl=impl)
    result.loss.backward()
    assert [float(x.detach()) for x in result] == [float(x) for x in clean]
    assert leaf.grad is not None and leaf.grad.isfinite().all() and largest(leaf.grad[1::2]) == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_logits_give_the_same_result(impl: Any, dtype: torch.dtype) -> None:
    student, teacher, labels = logits_of(8, 33, dtype), logits_of(8, 33, dtype), labels_of(8, 33)
    wide = torch.full((16, 50), 7.0, dtype=dtype)
    wide[::2, :33] = student

    def run(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_grad(lambda leaf: divergence(leaf, t, labels, hard_weight=0.5, impl=impl).loss, x)

    expected = run(student, teacher)
    for x, t in ((student.T.contiguous().T, teacher), (wide[::2, :33], teacher.T.contiguous().T)):
        assert not x.is_contiguous()
        for a, b in zip(run(x, t), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_teacher_may_have_another_dtype_and_more_padding(impl: Any) -> None:
    student, teacher = logits_of(5, 20), logits_of(5, 24, torch.bfloat16)
    log_p, q = student[:, :18].double().log_softmax(-1), teacher[:, :18].double().softmax(-1)
    result = divergence(student, teacher, vocab_size=18, impl=impl)
    assert result.loss.item() == pytest.approx(F.kl_div(log_p, q, reduction="sum").item(), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_never_reaches_the_teacher(impl: Any) -> None:
    student, teacher = logits_of(3, 8).requires_grad_(), logits_of(3, 8).requires_grad_()
    divergence(student, teacher, None, impl=impl).loss.backward()
    assert student.grad is not None and teacher.grad is None
    with torch.no_grad():
        assert not divergence(student, teacher, None, impl=impl).loss.requires_grad


@has_cpu
def test_auto_takes_the_operator_where_it_can_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=picker.__name__)
    picker._say.cache_clear()
    logits, double = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(2):
        assert picker.pick("auto", logits, logits) is cpu.value_and_grad
        assert picker.pick("auto", double, logits) is reference.reference_value_and_grad
    assert [record.args[0].split(" (")[0] for record in caplog.records if isinstance(record.args, tuple)] == [
        "C++ operator on CPU",
        "eager reference",
    ]
