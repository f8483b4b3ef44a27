"""The Triton kernels: on a GPU, and their logic on CPU in Triton's interpreter.

The interpreter must be chosen before the kernels are imported, so one test runs this file again in a process of its own.
Programs run one after another there: nothing that waits for another program can be tested without a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_truth import SETTINGS, assert_true_to_float64, largest, make_case, top_k_targets
from torch import Tensor

from distill.kernels import SparseTargets, divergence, gpu, sparse_divergence
from distill.kernels.gpu.plan import Device, Plan, Shape, plan

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    import interpreter  # noqa: F401  puts its arithmetic right

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _marks(kernel: str, kind: str) -> list[pytest.MarkDecorator]:
    if kernel == "split":  # waits for other programs
        return [pytest.mark.gpu]
    return [] if kernel == "tiles" or kind == "jsd" else [pytest.mark.slow]


# Small tiles, so that small rows have several; a row of 1004 columns is two parts of a split.
TILES: dict[str, Plan] = {
    "one tile": Plan("loop", 2048, 4, ptx=not IS_INTERPRETED),
    "tiles": Plan("loop", 256, 4, ptx=not IS_INTERPRETED),
    "phases": Plan("phases", 512, 4, splits=2, ptx=not IS_INTERPRETED),
    "split": Plan("split", 512, 4, splits=2, ptx=not IS_INTERPRETED),
}
# Every kind in tiles and every kernel for the kind with most phases; the rest is slow in the interpreter.
KERNELS_AND_KINDS = [
    pytest.param(kernel, kind, marks=_marks(kernel, kind)) for kernel in TILES for kind in SETTINGS
]
POINT_TILES = {"one tile": 2048, "tiles": 256}


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """Runs in the interpreter's process and on a GPU."""
    return test if IS_INTERPRETED else pytest.mark.gpu(test)


on_host = pytest.mark.skipif(IS_INTERPRETED, reason="needs no kernel")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the kernels take a plan of TILES; teachers that are points get tiles of 256 columns or one."""

    def force(name: str) -> None:
        from distill.kernels.gpu import launch

        points = Plan("points", POINT_TILES.get(name, 256), 4, ptx=not IS_INTERPRETED)
        monkeypatch.setattr(
            launch, "plan", lambda shape, device: TILES[name] if shape.target == "dense" else points
        )

    return force


@on_host
@pytest.mark.parametrize("about", ["naive_error or points", "edge or operator"])
def test_in_the_interpreter_the_kernels_are_right(about: str) -> None:
    _run_interpreted("not gpu and not slow", about)


@on_host
@pytest.mark.slow
def test_in_the_interpreter_all_kernels_are_right() -> None:
    _run_interpreted("not gpu and slow", "")


def _run_interpreted(marks: str, names: str) -> None:
    command = [sys.executable, "-m", "pytest", "-qx", "--noconftest", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, "-m", marks, "-k", names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@on_device
@pytest.mark.parametrize("kernel, kind", KERNELS_AND_KINDS)
def test_naive_error_bounds_every_kernel_and_setting(use: Any, kernel: str, kind: str) -> None:
    use(kernel)
    for number, settings in enumerate(SETTINGS[kind]):
        case = make_case(3, 1001, torch.float32, weighted=number % 2 == 1, device=DEVICE)
        assert_true_to_float64(case, {"kind": kind, **settings}, "triton")


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 17, pytest.param(1000, marks=pytest.mark.slow), 4097])
def test_naive_error_bounds_every_dtype_and_size(dtype: torch.dtype, V: int) -> None:
    for kind in SETTINGS:
        case = make_case(1, V, dtype, device=DEVICE)
        settings = {
            "kind": kind,
            "beta": 0.4,
            "temperature": 2.0,
            "temperature_on": "both",
            "hard_weight": 0.3,
        }
        assert_true_to_float64(case, settings, "triton")


@on_device
@pytest.mark.parametrize("kind", ["forward_kl", pytest.param("jsd", marks=pytest.mark.slow)])
def test_naive_error_bounds_a_real_vocabulary(kind: str) -> None:
    case = make_case(2, 32000, torch.bfloat16, device=DEVICE)
    assert_true_to_float64(case, {"kind": kind, "beta": 0.4, "hard_weight": 0.3}, "triton")


@on_device
@pytest.mark.parametrize("tile", POINT_TILES)
@pytest.mark.parametrize("tail", [False, True], ids=["cut off", "with tail"])
def test_points_of_sparse_targets_are_within_the_naive_error(use: Any, tile: str, tail: bool) -> None:
    use(tile)
    for number, settings in enumerate(SETTINGS["forward_kl"]):
        if settings.get("temperature", 1.0) >= 1e-4:
            case = make_case(4, 1001, DTYPES[number % 3], weighted=number % 2 == 1, device=DEVICE)
            targets = top_k_targets(case, 13, tail=tail)
            assert_true_to_float64(case, settings, "triton", targets)


@on_device
@pytest.mark.parametrize("tile", POINT_TILES)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "tvd"])
def test_points_of_a_cold_teacher_are_within_the_naive_error(use: Any, tile: str, kind: str) -> None:
    use(tile)
    for dtype in DTYPES:
        case = make_case(4, 1001, dtype, weighted=True, device=DEVICE)
        case.teacher[:, 700] = case.teacher[:, :1001].amax(1)  # equals: the first one counts
        settings = {"kind": kind, "beta": 0.2, "temperature": 1e-5, "hard_weight": 0.3}
        assert_true_to_float64(case, settings, "triton")


@on_device
def test_points_far_above_the_rest_leave_the_tail_exact(use: Any) -> None:
    """1 less the mass of the points would be 0 in float32, and the loss infinite."""
    use("tiles")
    student = torch.randn(3, 600, device=DEVICE)
    ids = torch.tensor([[5, 300, 599]] * 3, device=DEVICE)
    student[:, ids[0]] += torch.tensor([60.0, 200.0, 1e4], device=DEVICE)[:, None]
    targets = SparseTargets(ids, torch.full((3, 3), 0.3, device=DEVICE), torch.full((3,), 0.1, device=DEVICE))

    def run(x: Tensor, impl: Any) -> tuple[Tensor, Tensor]:
        x.requires_grad_()
        loss = sparse_divergence(x, targets, impl=impl).loss
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    (loss, grad), (truth, true_grad) = run(student, "triton"), run(student.detach().double(), "reference")
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert largest(grad - true_grad) <= 1e-6


def _result(student: Tensor, teacher: Any, labels: Tensor | None, impl: str, **keywords: Any) -> list[Tensor]:
    """Sums and gradient."""
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    call: Any = sparse_divergence if isinstance(teacher, SparseTargets) else divergence
    sums = call(student * 1.0, teacher, labels, impl=impl, **keywords)
    return [each.detach() for each in sums] + [torch.autograd.grad(sums.loss, student)[0]]


def _assert_same(found: list[Tensor], expected: list[Tensor], atol: float = 2e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=atol, equal_nan=True)


@on_device
@pytest.mark.parametrize("kernel, kind", KERNELS_AND_KINDS)
def test_edge_rows_give_what_the_reference_gives(use: Any, kernel: str, kind: str) -> None:
    """Ignored rows of NaN, all -inf on both sides, huge offsets, masked classes, equal logits."""
    use(kernel)
    student, teacher = (torch.randn(6, 1004, device=DEVICE) * 3 for _ in range(2))
    labels = torch.tensor([3, -100, 700, 900, 0, 1003], device=DEVICE)
    student[1], teacher[1] = torch.nan, torch.inf
    student[0], teacher[0] = student[0] + 1e4, teacher[0] - 1e4
    student[2, 256:512], teacher[2, 256:512] = -torch.inf, -torch.inf  # a whole tile
    student[3, [600, 900]] = 50.0
    teacher[4] = student[4]
    for in_place, hard_weight in ((False, 0.5), (True, 0.0)):
        keywords = {"kind": kind, "in_place": in_place, "hard_weight": hard_weight, "temperature": 2.0}
        found, expected = (
            _result(student, teacher, labels, impl, **keywords) for impl in ("triton", "reference")
        )
        _assert_same(found, expected, atol=5e-5 if kind == "tvd" else 2e-6)


@on_device
@pytest.mark.parametrize("kernel, kind", KERNELS_AND_KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_edge_a_broken_row_makes_the_loss_nan(use: Any, kernel: str, temperature: float, kind: Any) -> None:
    use(kernel)
    if kind == "reverse_kl" and not temperature:
        return  # is refused
    for side, bad in itertools.product(range(2), (torch.nan, torch.inf, -torch.inf)):
        logits = [torch.randn(1, 600, device=DEVICE) for _ in range(2)]
        logits[side][0, slice(None) if bad == -torch.inf else 555] = bad
        assert divergence(*logits, kind=kind, temperature=temperature, impl="triton").loss.isnan()


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edge_student_that_is_its_teacher_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(5, 1004, device=DEVICE)).to(dtype)
    student = logits.clone().requires_grad_()
    loss = divergence(student, logits, impl="triton").loss
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert student.grad is not None and not student.grad.any()


@on_device
def test_edge_memory_of_any_strides_is_read_and_written(use: Any) -> None:
    use("tiles")
    student, teacher = torch.randn(5, 600, device=DEVICE), torch.randn(5, 600, device=DEVICE).bfloat16()
    expected = _result(student[:, :300], teacher[:, :300], None, "triton")
    for view in (
        lambda x: x[:, :300],
        lambda x: x[:, :300].t().contiguous().t(),
        lambda x: x[:, 1:].roll(1, 1)[:, :300],
    ):
        _assert_same(
            _result(view(student), view(teacher), None, "triton"),
            _result(view(student), view(teacher), None, "reference"),
        )
    target = torch.full((5, 600), 7.0, device=DEVICE)[:, ::2]
    terms = _terms(300)
    gpu.value_and_grad(student[:, :300], teacher[:, :300], None, None, terms, target)
    assert largest(target - expected[-1]) <= 1e-6


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edge_a_gradient_is_scaled_in_float32_whatever_its_strides(dtype: torch.dtype) -> None:
    wide = torch.randn(3, 5008, device=DEVICE).to(dtype)
    for gradient in (wide[:, :5001], wide[:, 0], wide.T, wide[:0]):
        before, factor = gradient.double(), torch.tensor(1 / 3, device=DEVICE)
        assert gpu.scale_(gradient, factor) is gradient
        assert torch.equal(gradient, (before.float() * factor).to(dtype))
    assert gpu.scale_(wide[0], torch.tensor(math.nan, device=DEVICE)).isnan().all()


@on_device
def test_edge_a_gradient_times_one_is_itself() -> None:
    """Bits that a multiplication would change, if there were one."""
    gradient = torch.tensor([[float("nan"), -0.0, 1e-45]], device=DEVICE)
    bits = gradient.clone().view(torch.int32)
    gpu.scale_(gradient, torch.ones((), device=DEVICE))
    assert torch.equal(gradient.view(torch.int32), bits)


@on_device
def test_edge_no_rows_are_a_loss_of_zero() -> None:
    empty = torch.empty(0, 17, device=DEVICE)
    assert [each.item() for each in divergence(empty, empty, impl="triton")] == [0.0] * 6


@on_device
def test_edge_classes_that_do_not_exist_make_infinite_or_nan_sums_and_write_nowhere(use: Any) -> None:
    use("tiles")
    memory = torch.randn(4, 1024, device=DEVICE)
    student, before = memory[1:3, :1000], memory.clone()
    for label in (1000, 10**6, -1, -101, 2**32 + 5, 2**32 - 100):
        labels = torch.full((2,), label, device=DEVICE)
        sums = gpu.value_and_grad(student, student.clone(), labels, None, _terms(1000, hard_weight=1.0), None)
        assert sums.hard.isinf() and sums.loss.isinf() and sums.num_correct == 0
    for wrong in (1000, -5, 2**32 + 5):
        targets = SparseTargets(torch.full((2, 1), wrong, device=DEVICE), torch.ones(2, 1, device=DEVICE))
        assert gpu.value_and_grad(student, targets, None, None, _terms(1000), student).loss.isnan()
    changed = (memory != before) & ~(before != before)
    changed[1:3, :1000] = False
    assert not changed.any()


def _terms(vocab_size: int, **changes: Any) -> Any:
    from distill.kernels.terms import resolve_terms

    common = {"kind": "forward_kl", "beta": 0.5, "soft_weight": 1.0, "hard_weight": 0.0, "temperature": 1.0}
    more = {"temperature_on": "teacher", "temperature_squared": False, "vocab_size": vocab_size}
    return resolve_terms(**{**common, **more, **changes})


@on_device
def test_operator_passes_opcheck() -> None:
    student, teacher = (torch.randn(3, 40, device=DEVICE) for _ in range(2))
    labels, grad = torch.tensor([1, -100, 39], device=DEVICE), torch.empty(3, 40, device=DEVICE)
    settings = ("jsd", 0.3, 1.0, 0.2, 2.0, 1.0, 4.0, 37)
    arguments = (student, teacher, None, None, None, labels, None, *settings, grad)
    torch.library.opcheck(torch.ops.distill.triton_divergence.default, arguments)


@on_device
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch, about itself
def test_operator_is_one_node_of_a_compiled_graph() -> None:
    student, teacher = (torch.randn(3, 40, device=DEVICE) for _ in range(2))

    def step(x: Tensor) -> Tensor:
        return divergence(x * 2, teacher, kind="tvd", impl="triton", in_place=True).loss

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = student.clone().requires_grad_()
        loss = run(leaf)
        results.append([loss.detach(), torch.autograd.grad(loss, leaf)[0]])
    _assert_same(results[0], results[1], atol=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("V", [30522, 32000, 50257, 128256])
def test_programs_that_wait_for_one_another_give_what_separate_launches_give(kind: str, V: int) -> None:
    """The same sums in the same order, so the same bits; enough rows that not all programs are resident."""
    from distill.kernels.gpu.launch import Call, run_plan

    student, teacher = (torch.randn(2048, V, device="cuda").bfloat16() for _ in range(2))
    labels = torch.randint(0, V, (2048,), device="cuda")
    labels[::7] = -100
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = plan(Shape("dense", kind, 2, 2048, V, math.gcd(8, V)), Device("cuda", processors))
    assert chosen.kernel == "split"
    results = []
    for kernel in ("split", "split", "phases"):
        grad = torch.empty_like(student)
        call = Call(student, teacher, labels, None, _terms(V, kind=kind, hard_weight=0.5), grad)
        sums = run_plan(call, dataclasses.replace(chosen, kernel=kernel))
        results.append([*sums, grad])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    student, teacher = (torch.randn(64, 32000, device="cuda") for _ in range(2))
    labels = torch.randint(0, 32000, (64,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for kind in SETTINGS:
            gpu.value_and_grad(
                student, teacher, labels, None, _terms(32000, kind=kind, hard_weight=1.0), student.clone()
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_logits() -> None:
    student, teacher = (torch.randn(64, 32000, device="cuda") for _ in range(2))
    terms, grad = _terms(32000), torch.empty_like(student)
    gpu.value_and_grad(student, teacher, None, None, terms, grad)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = gpu.value_and_grad(student, teacher, None, None, terms, grad)
    for _ in range(3):
        student.normal_()
        graph.replay()
        other = torch.empty_like(student)
        expected = gpu.value_and_grad(student, teacher, None, None, terms, other)
        assert torch.equal(sums.loss, expected.loss) and torch.equal(grad, other)


@pytest.mark.gpu
def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    logits = [[torch.randn(1024, 32000, device="cuda").bfloat16() for _ in range(3)] for _ in streams]

    def loss(student: Tensor, teacher: Tensor, grad: Tensor) -> Tensor:
        return gpu.value_and_grad(student, teacher, None, None, _terms(32000), grad).loss

    expected = [loss(*each) for each in logits]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, each in zip(streams, logits, strict=True):
            with torch.cuda.stream(stream):
                found.append(loss(*each))
    torch.cuda.synchronize()
    assert all(torch.equal(loss, expected[number % 2]) for number, loss in enumerate(found))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_reach_the_right_row() -> None:
    rows, V = 3, 17408
    stride = 2**30 + 2**10  # the third row begins beyond 2^31 elements
    memory = torch.zeros(2 * stride + V, dtype=torch.bfloat16, device="cuda")
    student, teacher = (
        memory.as_strided((rows, V), (stride, 1)),
        torch.randn(rows, V, device="cuda").bfloat16(),
    )
    student.copy_(torch.randn(rows, V))
    for kind in SETTINGS:
        found, expected = (
            _result(x, teacher, None, "triton", kind=kind)[0] for x in (student, student.contiguous())
        )
        grad = torch.empty_like(teacher)
        sums = gpu.value_and_grad(student, teacher, None, None, _terms(V, kind=kind), grad)
        assert torch.equal(found, expected) and torch.equal(sums.loss, expected)
