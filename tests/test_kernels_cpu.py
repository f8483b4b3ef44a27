"""What is particular to the C++ operator; against float64 it is judged with the others in test_kernel_truth.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.kernels import Divergence, SparseTargets, cpu, divergence, sparse_divergence
from distill.kernels.reference import reference_divergence
from distill.kernels.terms import Terms, resolve_terms

pytestmark = pytest.mark.skipif(bool(cpu.load_problem), reason=cpu.load_problem or "built")

KINDS = ["forward_kl", "reverse_kl", "jsd", "tvd"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = "" if cpu.load_problem else torch.ops.distill.instruction_sets()


@pytest.fixture(params=ISAS.split(","))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this processor can run, in turn."""
    monkeypatch.setenv("DISTILL_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def terms_of(vocab_size: int, **settings: Any) -> Terms:
    defaults: dict[str, Any] = {
        "kind": "forward_kl",
        "beta": 0.3,
        "soft_weight": 1.0,
        "hard_weight": 0.0,
        "temperature": 2.0,
        "temperature_on": "both",
        "temperature_squared": True,
    }
    return resolve_terms(**(defaults | settings), vocab_size=vocab_size)


def run(
    student: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    **settings: Any,
) -> tuple[Divergence, Tensor]:
    """The sums and the gradient as the operator makes them."""
    grad = torch.empty_like(student)
    terms = terms_of(settings.pop("vocab_size", student.shape[1]), **settings)
    return cpu.value_and_grad(student, teacher, labels, weights, terms, grad), grad


def logits(N: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(N, V)).to(dtype)


def top_3_of(teacher: Tensor, tail: bool) -> SparseTargets:
    probs, ids = teacher.float().softmax(-1).topk(3)
    return SparseTargets(ids, probs, 1 - probs.sum(-1) if tail else None)


def same(found: tuple[Divergence, Tensor], expected: tuple[Divergence, Tensor]) -> bool:
    """Equal to the bit."""
    return all(map(torch.equal, found[0], expected[0])) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "sparse"])
def test_instruction_sets_agree_within_rounding(
    isa: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for V, temperature_on in itertools.product((1, 15, 16, 17, 1024, 1025, 2300), ("teacher", "both")):
        student, teacher, labels = logits(3, V, dtype), logits(3, V), torch.tensor([0, -100, V - 1])
        targets = top_3_of(teacher, tail=True) if kind == "sparse" and V > 3 else teacher
        settings = {"kind": "forward_kl" if kind == "sparse" else kind, "temperature_on": temperature_on}
        sums, grad = run(student, targets, labels, hard_weight=0.3, **settings)
        with monkeypatch.context() as patch:
            patch.setenv("DISTILL_ISA", "portable")
            plain_sums, plain_grad = run(student, targets, labels, hard_weight=0.3, **settings)
        torch.testing.assert_close(sums, plain_sums, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(grad.float(), plain_grad.float(), rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponentials_keep_their_digits_down_to_the_smallest_and_are_zero_below(
    isa: str, dtype: torch.dtype
) -> None:
    below, labels = torch.linspace(-86.5, 0, 40001).to(dtype), torch.zeros(40001, dtype=torch.int64)
    student = torch.stack([torch.zeros_like(below), below], 1).float()
    _, grad = run(student, None, labels, soft_weight=0, hard_weight=1)
    true = student.double().softmax(-1)[:, 1]
    # Of the exponential, of the division, and of ln 2 as a float, which tells where e^x is next to nothing.
    budget = 2e-7 + 1e-7 + 2.8e-9 * below.double().abs()
    assert (((grad[:, 1] - true) / true).abs() < budget).all()
    student[:, 1] = -88.0
    student[0, 1] = -math.inf
    _, grad = run(student, None, labels, soft_weight=0, hard_weight=1)
    assert grad.count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "steps", [(0, 7, 14, 50), (-1e4, 0, 9, 1e4), (90, 0, -90, 5), (-math.inf, -math.inf, 3, 200)]
)
def test_largest_logits_that_rise_or_fall_between_blocks_cost_no_digits(
    isa: str, kind: str, steps: tuple[float, ...]
) -> None:
    student, teacher = logits(2, 4096), logits(2, 4096)
    for logits_NV, order in ((student, steps), (teacher, steps[::-1] if kind != "reverse_kl" else steps)):
        logits_NV.view(2, 4, 1024).add_(torch.tensor(order)[None, :, None])
    labels = torch.tensor([4000, 5])
    sums, grad = run(student, teacher, labels, kind=kind, hard_weight=0.5)
    leaf = student.double().requires_grad_()
    terms = terms_of(4096, kind=kind, hard_weight=0.5)
    true = reference_divergence(leaf, teacher.double(), labels, None, terms)
    assert all(torch.allclose(a.double(), b.double(), rtol=2e-6) for a, b in zip(sums, true, strict=True))
    if true.loss.isfinite():
        true.loss.backward()
        assert (grad - leaf.grad).abs().max() < 2e-6 * leaf.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_every_gradient_is_rounded_as_torch_does(
    isa: str, dtype: torch.dtype
) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    student = torch.stack([patterns, patterns.flip(0), torch.zeros_like(patterns)], 1)
    labels = torch.full((len(patterns),), 2)
    scale = {"soft_weight": 0.0, "hard_weight": 3e-5}  # so that float16 has subnormal gradients
    sums, grad = run(student, None, labels, **scale)
    wide_sums, wide_grad = run(student.float(), None, labels, **scale)
    assert all(map(torch.equal, sums, wide_sums)) and torch.equal(grad, wide_grad.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_no_nan_is_lost_wherever_it_is_and_whatever_its_bits(isa: str, kind: str) -> None:
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00155], dtype=torch.int32).view(torch.float32)
    for column, nan, low in itertools.product((0, 1023, 1024, 1049), odd, (0.0, -math.inf)):
        healthy, broken = logits(1, 1050), logits(1, 1050)
        broken[0, column], healthy[0, column] = nan, low
        assert run(healthy, broken, kind=kind)[0].loss.isnan()
        assert run(broken, healthy, kind=kind)[0].loss.isnan()
        if kind != "reverse_kl":
            assert run(healthy, broken, kind=kind, temperature=0.0)[0].loss.isnan()
        assert run(broken, None, torch.tensor([3]), soft_weight=0, hard_weight=1)[0].loss.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_equals_out_of_place_to_the_bit(isa: str, dtype: torch.dtype) -> None:
    labels, weights = torch.tensor([5, -100, 0, 1024, 7]), torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0])
    for kind, V in itertools.product(KINDS, (40, 2300)):
        student, teacher = logits(5, V, dtype), logits(5, V, dtype)
        arguments = (teacher, labels.clamp(max=V - 1), weights)
        settings = {"kind": kind, "hard_weight": 0.5, "vocab_size": V - 3}
        arguments[1][3] = min(1024, V - 4)
        apart = run(student.clone(), *arguments, **settings)
        terms = terms_of(settings.pop("vocab_size"), **settings)
        assert same((cpu.value_and_grad(student, *arguments, terms, student), student), apart)


def test_teacher_may_be_the_memory_that_becomes_the_gradient() -> None:
    both = logits(3, 1500)
    sums = cpu.value_and_grad(both, both, None, None, terms_of(1500), both)
    assert sums.soft == 0 and both.count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_number_of_threads_does_not_change_a_bit(kind: str) -> None:
    student, teacher = logits(129, 1300), logits(129, 1300)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            results.append(run(student, teacher, torch.arange(129), kind=kind, hard_weight=0.1))
    finally:
        torch.set_num_threads(threads)
    assert same(results[1], results[0]) and same(results[2], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_columns_change_nothing(kind: str) -> None:
    student, teacher = logits(6, 1100), logits(6, 1100)
    expected = run(student, teacher, kind=kind)
    wide, tall = torch.zeros(12, 1200), torch.zeros(1100, 6)
    for view in (wide[::2, 50:1150], tall.T):
        view.copy_(student)
        sums = cpu.value_and_grad(view, teacher.T.contiguous().T, None, None, terms_of(1100, kind=kind), view)
        assert same((sums, view.contiguous()), expected)
    assert wide[1::2].count_nonzero() == 0 and wide[:, :50].count_nonzero() == 0


def test_no_column_beyond_the_gradient_is_written() -> None:
    room = torch.full((4, 64), 7.0)
    for dtype, width in itertools.product(DTYPES, (1, 15, 17, 33)):
        held = room.to(dtype, copy=True)
        student = held[:, :width]
        cpu.value_and_grad(student, logits(4, width), None, None, terms_of(width), student)
        assert (held[:, width:] == 7).all()


def arguments_of(
    student: Tensor, teacher: Tensor | None, sparse: SparseTargets | None, grad: bool
) -> tuple[Any, ...]:
    """As the raw operator takes them."""
    ids, probs, tail, _ = sparse or (None,) * 4
    labels, weights = torch.tensor([1, -100, 3]), torch.rand(3)
    numbers = ("jsd" if teacher is not None else "forward_kl", 0.5, 1.0, 0.5, 2.0, 2.0, student.shape[1] - 1)
    return (
        student,
        teacher,
        ids,
        probs,
        tail,
        labels,
        weights,
        torch.empty_like(student) if grad else None,
        *numbers,
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_operator_passes_opcheck(grad: bool, sparse: bool) -> None:
    student, teacher = logits(3, 18, torch.bfloat16), logits(3, 18)
    targets = top_3_of(teacher[:, :17], tail=True) if sparse else None
    arguments = arguments_of(student, None if sparse else teacher, targets, grad)
    torch.library.opcheck(torch.ops.distill.divergence.default, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "sparse"])
def test_compiled_without_a_graph_break_it_gives_the_same_loss_and_gradient(kind: str, backend: str) -> None:
    teacher, labels = logits(4, 40), torch.tensor([1, -100, 3, 4])
    targets = top_3_of(teacher, tail=True)
    settings: dict[str, Any] = {"hard_weight": 0.1, "in_place": True, "impl": "cpu"}

    def loss(x: Tensor) -> Tensor:
        if kind == "sparse":
            return sparse_divergence(2 * x, targets, labels, **settings).loss
        return divergence(2 * x, teacher, labels, kind=kind, **settings).loss  # type: ignore[arg-type]

    student, results = logits(4, 40), []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        (3 * value).backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_operator_names_the_label_that_is_no_class_and_its_row(label: int) -> None:
    with pytest.raises(RuntimeError, match=rf"label {label} in row 2 is neither -100 nor in 0\.\.39"):
        run(logits(3, 40), None, torch.tensor([1, -100, label]), soft_weight=0.0)


@pytest.mark.parametrize("wrong", [-1, 40])
def test_operator_names_the_target_id_that_is_no_class_and_its_row(wrong: int) -> None:
    targets = top_3_of(logits(3, 40), tail=False)
    targets.ids_NK[1, 2] = wrong
    with pytest.raises(RuntimeError, match=rf"target id {wrong} in row 1 is not in 0\.\.39"):
        run(logits(3, 40), targets)
    targets.probs_NK[1, 2] = 0
    assert run(logits(3, 40), targets)[0].loss.isfinite()


@pytest.mark.parametrize(
    "grad, reason",
    [
        (torch.empty(1, 40).expand(3, 40), "rows of grad must not overlap"),
        (torch.empty(3, 41), "dtype and shape of student"),
        (torch.empty(3, 40, dtype=torch.float16), "dtype and shape of student"),
    ],
)
def test_operator_refuses_a_gradient_it_can_not_write(grad: Tensor, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        cpu.value_and_grad(logits(3, 40), logits(3, 40), None, None, terms_of(40), grad)


def test_unknown_instruction_set_is_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_ISA", "mmx")
    with pytest.raises(RuntimeError, match=f"DISTILL_ISA is mmx, this processor and build have {ISAS}"):
        run(logits(1, 8), logits(1, 8))


def test_bare_operator_refuses_to_be_differentiated_to_nothing() -> None:
    logits = torch.randn(2, 9, requires_grad=True)
    terms = ("forward_kl", 0.5, 1.0, 0.0, 1.0, 1.0, 9)
    with pytest.raises(RuntimeError, match=r"can't be differentiated: call distill\.kernels\.divergence"):
        torch.ops.distill.divergence(logits, torch.randn(2, 9), *[None] * 6, *terms)
