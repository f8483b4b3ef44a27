"""What the Triton side decides without a GPU: which kernel in which tiles, and what it can not serve."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import torch
from kernel_truth import SETTINGS

from distill.kernels import gpu
from distill.kernels.gpu.plan import Device, Plan, Shape, candidates, plan

ROOT = Path(__file__).resolve().parent.parent
H200 = Device("cuda", 132)


def test_plan_splits_rows_that_pass_one_tile_and_keeps_short_ones_whole() -> None:
    assert plan(dense("forward_kl", 2, 32000), H200) == Plan("split", 4096, 4, 80, 8)
    assert plan(dense("jsd", 2, 128256), H200) == Plan("split", 4096, 4, 96, 32)
    assert plan(dense("tvd", 4, 32000), H200) == Plan("split", 2048, 4, 96, 16)
    assert plan(dense("forward_kl", 2, 8192), H200) == Plan("loop", 8192, 8, 80)
    assert plan(dense("forward_kl", 2, 17, rows=1, align=1), H200) == Plan("loop", 128, 4, 128)


def test_plan_never_waits_where_that_is_not_safe() -> None:
    """Elsewhere than on NVIDIA GPUs, and where a few rows would fill the device."""
    for device in (Device("hip", 304), Device("interpreter")):
        for rows in (1, 100, 8192):
            chosen = plan(dense("jsd", 2, 128256, rows=rows), device)
            assert chosen.kernel in ("phases", "loop") and not chosen.ptx and chosen.registers is None
    assert plan(dense("forward_kl", 2, 128256, rows=64), Device("hip", 304)).kernel == "phases"
    for processors in range(1, 200):
        chosen = plan(dense("forward_kl", 4, 262144), Device("cuda", processors))
        assert chosen.kernel == "loop" or chosen.programs_at_once * processors >= 4 * chosen.splits


def test_plan_covers_every_column_and_a_held_row_fits_its_tile() -> None:
    sizes = (1, 127, 128, 129, 4096, 8192, 8193, 30522, 50257, 128256, 262144)
    for columns, itemsize, kind in itertools.product(sizes, (2, 4), SETTINGS):
        shape = dense(kind, itemsize, columns, align=math.gcd(8, columns))
        for chosen in (plan(shape, H200), *candidates(shape)):
            assert chosen.block & (chosen.block - 1) == 0
            held = chosen.block * chosen.splits
            assert chosen.kernel == "loop" or held >= columns > held - chosen.block
    assert candidates(dense("forward_kl", 2, 32000))[0] == plan(dense("forward_kl", 2, 32000), H200)


def dense(kind: str, itemsize: int, columns: int, rows: int = 8192, align: int = 8) -> Shape:
    return Shape("dense", kind, itemsize, rows, columns, align)


def test_without_triton_the_package_says_so_and_imports() -> None:
    code = "import sys; sys.modules['triton'] = None\nfrom distill.kernels import gpu; print(gpu.problem_with(None, None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("triton is not installed"), done


def test_logits_that_can_not_be_served_are_told_why() -> None:
    half, double = torch.empty(1, 3), torch.empty(1, 3, dtype=torch.float64)
    assert (
        gpu.problem_with(double, half)
        == "student logits are torch.float64, the kernels take bfloat16, float16 and float32"
    )
    assert gpu.problem_with(half, double).startswith("teacher logits are torch.float64")
    assert gpu.problem_with(half, None) == "logits are on cpu, the kernels run on CUDA devices"
