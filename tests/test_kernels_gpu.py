"""The Triton kernels: on a GPU, and their logic on CPU in Triton's interpreter.

The interpreter must be chosen before the kernels are imported, so one test runs this file again in a process of its own.
Programs run one after another there: nothing that waits for another program can be tested without a GPU.
"""

from __future__ import annotations

import itertools
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
from distill.kernels.gpu.plan import Device, Plan

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    import interpreter  # noqa: F401  puts its arithmetic right

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
ROOT = Path(__file__).resolve().parent.parent
H200 = Device("cuda", 132)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Small tiles, so that small rows have several; a row of 1004 columns is four parts of a split.
TILES: dict[str, Plan] = {
    "one tile": Plan("loop", 2048, 4, ptx=not IS_INTERPRETED),
    "tiles": Plan("loop", 256, 4, ptx=not IS_INTERPRETED),
    "phases": Plan("phases", 256, 4, splits=4, ptx=not IS_INTERPRETED),
    "split": Plan("split", 256, 4, splits=4, ptx=not IS_INTERPRETED),
}
WAITS = pytest.param("split", marks=pytest.mark.gpu)
KERNELS = ["one tile", "tiles", "phases", WAITS]
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
            launch, "plan", lambda target, *unused: TILES[name] if target == "dense" else points
        )

    return force


@on_host
@pytest.mark.parametrize("about", ["naive_error", "points", "edge", "operator"])
def test_in_the_interpreter_the_kernels_are_right(about: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        __file__,
        "-m",
        "not gpu",
        "-k",
        about,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@on_device
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_naive_error_bounds_every_kernel_and_setting(use: Any, kernel: str, kind: str) -> None:
    use(kernel)
    for number, settings in enumerate(SETTINGS[kind]):
        case = make_case(4, 1001, torch.float32, weighted=number % 2 == 1, device=DEVICE)
        assert_true_to_float64(case, {"kind": kind, **settings}, "triton")


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 17, 1000, 4097])
def test_naive_error_bounds_every_dtype_and_size(dtype: torch.dtype, V: int) -> None:
    for kind in SETTINGS:
        case = make_case(2, V, dtype, device=DEVICE)
        settings = {"kind": kind, "temperature": 2.0, "temperature_on": "both", "hard_weight": 0.3}
        assert_true_to_float64(case, settings, "triton")


@on_device
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_naive_error_bounds_a_real_vocabulary(kind: str) -> None:
    case = make_case(2, 32000, torch.bfloat16, device=DEVICE)
    assert_true_to_float64(case, {"kind": kind, "hard_weight": 0.3}, "triton")


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
        beta = {"beta": 0.2} if kind == "jsd" else {}
        settings = {"kind": kind, "temperature": 1e-5, "hard_weight": 0.3, **beta}
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
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", SETTINGS)
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
    for in_place, hard_weight in itertools.product((False, True), (0.0, 0.5)):
        keywords = {"kind": kind, "in_place": in_place, "hard_weight": hard_weight, "temperature": 2.0}
        found, expected = (
            _result(student, teacher, labels, impl, **keywords) for impl in ("triton", "reference")
        )
        _assert_same(found, expected, atol=5e-5 if kind == "tvd" else 2e-6)


@on_device
@pytest.mark.parametrize("kernel", ["one tile", "tiles", "phases"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all -inf"])
def test_edge_a_broken_row_makes_the_loss_nan(use: Any, kernel: str, temperature: float, bad: Any) -> None:
    use(kernel)
    for kind, side in itertools.product(SETTINGS, range(2)):
        if temperature or kind != "reverse_kl":
            logits = [torch.randn(2, 1004, device=DEVICE) for _ in range(2)]
            logits[side][1, slice(None) if bad == "all -inf" else 777] = (
                -torch.inf if bad == "all -inf" else bad
            )
            assert divergence(*logits, kind=kind, temperature=temperature, impl="triton").loss.isnan()  # type: ignore[arg-type]


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
def test_edge_no_rows_are_a_loss_of_zero() -> None:
    empty = torch.empty(0, 17, device=DEVICE)
    assert [each.item() for each in divergence(empty, empty, impl="triton")] == [0.0] * 6


@on_device
def test_edge_classes_that_do_not_exist_make_infinite_or_nan_sums_and_write_nowhere(use: Any) -> None:
    use("tiles")
    memory = torch.randn(4, 1024, device=DEVICE)
    student, before = memory[1:3, :1000], memory.clone()
    for label in (1000, 10**6, -1, -101):
        labels = torch.full((2,), label, device=DEVICE)
        sums = gpu.value_and_grad(student, student.clone(), labels, None, _terms(1000, hard_weight=1.0), None)
        assert sums.hard.isinf() and sums.loss.isinf() and sums.num_correct == 0
    for wrong in (1000, -5):
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
