"""The divergence on logits against float64, with the error of the naive computation as budget; its edges."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.kernels import Divergence, cpu, divergence, picker

has_cpu = pytest.mark.skipif(bool(cpu.load_problem), reason=cpu.load_problem or "built")
BUILT = ["reference"] if cpu.load_problem else ["reference", "cpu"]
IMPLS = ["reference", pytest.param("cpu", marks=has_cpu)]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # relative; bfloat16: two roundings of the gradient
SHAPES = [*itertools.product((0, 1, 7, 33), (1, 2, 17, 1000, 1001, 4097)), (3, 32000)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1e-5, "temperature_on": "both", "temperature_squared": True},
    {"temperature": 0.5},
    {"temperature": 4.0, "temperature_squared": True},
    {"temperature": 0.5, "temperature_on": "both", "temperature_squared": True, "hard_weight": 0.3},
    {"temperature": 4.0, "temperature_on": "both", "kl_weight": 0.7, "hard_weight": 0.3},
    {"temperature": 1e-5, "kl_weight": 0.2, "hard_weight": 0.8},
    {"kl_weight": 0.0, "hard_weight": 1.0},
]


def logits_of(N: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (torch.randn(N, V) * scale).to(dtype)


def labels_of(N: int, V: int) -> Tensor:
    labels = torch.randint(0, V, (N,))
    labels[1::3] = -100
    return labels


def plain(student: Tensor, teacher: Tensor, labels: Tensor, vocab_size: int, s: dict[str, Any]) -> Tensor:
    """The loss written out, in the dtype of its inputs: the truth in float64, the naive result elsewhere."""
    keep = labels != -100
    student, teacher, labels = student[keep, :vocab_size], teacher[keep, :vocab_size], labels[keep]
    temperature = s.get("temperature", 1.0)
    if temperature < 1e-4:
        kl = F.cross_entropy(student, teacher.argmax(-1), reduction="sum")
    else:
        log_p = torch.log_softmax(student / (temperature if s.get("temperature_on") == "both" else 1.0), -1)
        kl = F.kl_div(log_p, torch.softmax(teacher / temperature, -1), reduction="sum")
        kl = kl * (temperature**2 if s.get("temperature_squared") else 1.0)
    hard = F.cross_entropy(student, labels, reduction="sum")
    return s.get("kl_weight", 1.0) * kl + s.get("hard_weight", 0.0) * hard


def value_and_grad(loss_of: Any, student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = loss_of(leaf)
    (grad,) = torch.autograd.grad(loss * 0.37, leaf)
    return loss.detach().double(), grad.double()


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, V", SHAPES)
def test_error_is_within_the_naive_error_and_a_tolerance(dtype: torch.dtype, N: int, V: int) -> None:
    for case, settings in enumerate(SETTINGS):
        padding = 3 * (case % 2)
        student, teacher = logits_of(N, V + padding, dtype), logits_of(N, V + padding, dtype)
        student[:, V:], teacher[:, V:] = 77.0, 99.0  # padding that would win if it were read
        labels = labels_of(N, V)
        written_out = partial(plain, labels=labels, vocab_size=V, s=settings)
        truth, true_grad = value_and_grad(
            lambda x, f=written_out, t=teacher: f(x, t.double()), student.double()
        )
        naive, naive_grad = value_and_grad(lambda x, f=written_out, t=teacher: f(x, t), student)
        loss_budget = (naive - truth).abs() + 1e-6 * (1 + truth.abs())
        grad_budget = largest(naive_grad - true_grad) + TOLERANCE[dtype] * largest(true_grad) + 1e-9
        for impl in BUILT:
            kernel = partial(divergence, vocab_size=V, impl=impl, **settings)
            loss, grad = value_and_grad(lambda x, f=kernel, t=teacher, y=labels: f(x, t, y).loss, student)
            assert (loss - truth).abs() <= loss_budget, (impl, settings, loss, naive, truth)
            assert largest(grad - true_grad) <= grad_budget, (impl, settings)
            assert largest(grad[:, V:]) == 0
            assert largest(grad[labels == -100]) == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_reference_passes_gradcheck_in_float64(settings: dict[str, Any]) -> None:
    student, teacher = logits_of(4, 7).double().requires_grad_(), logits_of(4, 7).double()
    labels = labels_of(4, 6)
    assert torch.autograd.gradcheck(
        lambda x: divergence(x, teacher, labels, vocab_size=6, **settings).loss, student
    )


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
    assert abs(result.kl.item()) <= 1e-6 and abs(result.loss.item()) <= 1e-6
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
        return divergence(x, None, labels, kl_weight=0.0, hard_weight=1.0, impl=impl).loss

    for a, b in zip(value_and_grad(cold, student), value_and_grad(hard, student), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_are_sums_over_counted_rows_without_weights(impl: Any) -> None:
    student, teacher, labels = logits_of(10, 40), logits_of(10, 40), labels_of(10, 40)
    labels[0] = student[0].argmax()
    result = divergence(
        student, teacher, labels, kl_weight=0.25, hard_weight=2.0, temperature=2.0,
        temperature_squared=True, impl=impl,
    )  # fmt: skip
    keep = labels != -100
    log_p, q = torch.log_softmax(student[keep], -1), torch.softmax(teacher[keep] / 2.0, -1)
    assert result.kl.item() == pytest.approx(F.kl_div(log_p, q, reduction="sum").item(), rel=1e-5)
    assert result.soft_ce.item() == pytest.approx(-(q * log_p).sum().item(), rel=1e-5)
    assert result.hard.item() == pytest.approx(
        F.nll_loss(log_p, labels[keep], reduction="sum").item(), rel=1e-5
    )
    assert result.loss.item() == pytest.approx(0.25 * 4 * result.kl.item() + 2 * result.hard.item(), rel=1e-5)
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
    assert result.kl.item() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_of_equal_logits_is_the_arg_max(impl: Any) -> None:
    student = torch.zeros(2, 5)
    result = divergence(student, torch.zeros(2, 5), torch.tensor([0, 1]), temperature=0.0, impl=impl)
    assert result.num_correct.item() == 1
    leaf = student.clone().requires_grad_()
    divergence(leaf, torch.zeros(2, 5), None, temperature=0.0, impl=impl).loss.backward()
    assert leaf.grad is not None and (leaf.grad.argmin(-1) == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_infinite_and_huge_logits_stay_exact(impl: Any, settings: dict[str, Any]) -> None:
    student, teacher, labels = logits_of(6, 20), logits_of(6, 20), torch.arange(6)
    student[0], teacher[0] = student[0] + 1e4, teacher[0] - 1e4
    student[1, 3], teacher[1, 4] = 1e4, 1e4
    student[2, 10:], teacher[2, 10:] = -torch.inf, -torch.inf  # a smaller vocabulary on both sides
    teacher[3, 5:] = -torch.inf

    def kernel(x: Tensor) -> Tensor:
        return divergence(x, teacher, labels, impl=impl, **settings).loss

    def row_by_row(
        x: Tensor,
    ) -> Tensor:  # -inf on both sides is NaN when written out: leave those columns out
        rows = ((x[i : i + 1], teacher[i : i + 1].double(), labels[i : i + 1]) for i in range(6))
        widths = (20, 20, 10, 20, 20, 20)
        parts = zip(rows, widths, strict=True)
        return torch.stack([plain(*row, vocab_size=width, s=settings) for row, width in parts]).sum()

    truth, true_grad = value_and_grad(row_by_row, student.double())
    loss, grad = value_and_grad(kernel, student)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert largest(grad - true_grad) <= 1e-6 * (1 + largest(true_grad))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_logit_makes_the_loss_nan_instead_of_passing_unseen(impl: Any, bad: float) -> None:
    for broken in range(2):
        pair = [logits_of(4, 1001), logits_of(4, 1001)]
        pair[broken][2, 500] = bad
        assert divergence(*pair, None, impl=impl).loss.isnan()


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
        return value_and_grad(lambda leaf: divergence(leaf, t, labels, hard_weight=0.5, impl=impl).loss, x)

    expected = run(student, teacher)
    for x, t in ((student.T.contiguous().T, teacher), (wide[::2, :33], teacher.T.contiguous().T)):
        assert not x.is_contiguous()
        for a, b in zip(run(x, t), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_teacher_may_have_another_dtype_and_more_padding(impl: Any) -> None:
    student, teacher = logits_of(5, 20), logits_of(5, 24, torch.bfloat16)
    truth = plain(student.double(), teacher.double(), torch.zeros(5).long(), 18, {})
    result = divergence(student, teacher, None, vocab_size=18, impl=impl)
    assert result.loss.item() == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_never_reaches_the_teacher(impl: Any) -> None:
    student, teacher = logits_of(3, 8).requires_grad_(), logits_of(3, 8).requires_grad_()
    divergence(student, teacher, None, impl=impl).loss.backward()
    assert student.grad is not None and teacher.grad is None
    with torch.no_grad():
        assert not divergence(student, teacher, None, impl=impl).loss.requires_grad


@has_cpu
def test_second_backward_through_the_operator_is_refused_not_wrong() -> None:
    student = logits_of(3, 8).requires_grad_()
    loss = divergence(student, logits_of(3, 8), None, impl="cpu").loss
    (loss * 0.5).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@has_cpu
def test_exponential_of_the_operator_is_within_its_stated_error() -> None:
    x = -torch.linspace(0, 86, 20_001)
    student = torch.stack([torch.zeros_like(x), x], dim=1).requires_grad_()
    divergence(
        student, None, torch.zeros(len(x)).long(), kl_weight=0.0, hard_weight=1.0, impl="cpu"
    ).loss.backward()
    assert student.grad is not None
    truth = torch.sigmoid(x.double())  # probability of the second of two classes: e^x / (1 + e^x)
    assert ((student.grad[:, 1] - truth).abs() / truth).max() < 2e-7 + 2 * torch.finfo(torch.float32).eps


@has_cpu
def test_operator_gives_the_same_bits_for_any_number_of_threads(threads: Any) -> None:
    student, teacher, labels = logits_of(301, 129), logits_of(301, 129), labels_of(301, 129)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(
            value_and_grad(
                lambda x: divergence(x, teacher, labels, hard_weight=0.5, impl="cpu").loss, student
            )
        )
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


LOGITS, LABELS = torch.zeros(2, 5), torch.tensor([0, 4])
BAD_INPUT: list[tuple[tuple[Any, Any, Any], dict[str, Any], str]] = [
    ((torch.zeros(2, 5, 1), LOGITS, None), {}, r"\[N, V\]"),
    ((LOGITS.long(), LOGITS, None), {}, "floating"),
    ((LOGITS, torch.zeros(3, 5), None), {}, "2 rows, teacher 3"),
    ((LOGITS, torch.zeros(2, 6), None), {}, "5 columns, teacher 6"),
    ((LOGITS, LOGITS, None), {"vocab_size": 6}, r"1\.\.5.*got 6"),
    ((LOGITS, LOGITS, torch.tensor([0, 5])), {}, r"label 5 in row 1"),
    ((LOGITS, LOGITS, torch.tensor([-1, 0])), {}, r"label -1 in row 0"),
    ((LOGITS, LOGITS, torch.tensor([0, 4])), {"vocab_size": 4}, r"label 4 in row 1"),
    ((LOGITS, LOGITS, torch.tensor([0])), {}, r"int64 \[2\], got torch.int64 \(1,\)"),
    ((LOGITS, LOGITS, LABELS.float()), {}, "int64"),
    ((LOGITS, None, LABELS), {}, "no teacher logits"),
    ((LOGITS, LOGITS, None), {"hard_weight": 0.1}, "no labels"),
    ((LOGITS, LOGITS, None), {"temperature": -1.0}, "temperature.*-1"),
    ((LOGITS, LOGITS, None), {"temperature": float("nan")}, "temperature.*nan"),
    ((LOGITS, LOGITS, None), {"temperature_on": "student"}, "'student'"),
    ((LOGITS, LOGITS, None), {"impl": "cuda"}, "'cuda'"),
    ((LOGITS.double(), LOGITS, None), {"impl": "cpu"}, "can not serve"),
    ((LOGITS.to("meta"), LOGITS.to("meta"), None), {"impl": "cpu"}, "can not serve"),
    ((LOGITS.to("meta"), LOGITS, None), {}, "teacher on cpu"),
]


@pytest.mark.parametrize("tensors, settings, message", BAD_INPUT, ids=[case[2] for case in BAD_INPUT])
def test_input_that_does_not_fit_is_refused(tensors: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(*tensors, **settings)


@has_cpu
def test_auto_takes_the_operator_where_it_can_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=picker.__name__)
    picker._say.cache_clear()
    for _ in range(2):
        assert picker.pick("auto", LOGITS, LOGITS) is cpu.cpu_divergence
        assert picker.pick("auto", LOGITS.double(), LOGITS) is picker.reference_divergence
    assert [record.args[0].split(" (")[0] for record in caplog.records if isinstance(record.args, tuple)] == [
        "C++ operator on CPU",
        "eager reference",
    ]


@has_cpu
def test_operator_passes_opcheck() -> None:
    student, teacher = logits_of(4, 9), logits_of(4, 11)
    for labels, want_grad in ((labels_of(4, 9), True), (None, False)):
        arguments = (student, teacher, labels, 1.0, 0.5, 2.0, 1.0, 9, want_grad)
        torch.library.opcheck(torch.ops.distill.divergence, arguments)


@has_cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_operator_is_one_node_of_a_compiled_graph() -> None:
    student, teacher, labels = logits_of(6, 17), logits_of(6, 17), labels_of(6, 17)

    def step(x: Tensor) -> Divergence:
        return divergence(x, teacher, labels, hard_weight=0.5, temperature=2.0, impl="cpu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = value_and_grad(lambda x: step(x).loss, student)
    for a, b in zip(value_and_grad(lambda x: compiled(x).loss, student), expected, strict=True):
        assert torch.equal(a, b)
