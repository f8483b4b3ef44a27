"""Every shipped Triton configuration compiled for a GPU that is not there: no spills, 16-byte loads, registers in bounds.

`pytest -s` prints the table: registers, spills, programs a multiprocessor holds, columns it has in flight.
The launches are those of the real calls, on tensors without memory, through Triton's own binder.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill.kernels import SparseTargets, gpu
from distill.kernels.gpu.plan import Device, Plan, Target, plan
from distill.kernels.terms import resolve_terms

pytestmark = [
    pytest.mark.skipif(bool(gpu.load_problem), reason=gpu.load_problem or "triton is there"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
    ),
]
H200 = Device("cuda", 132)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Asked(NamedTuple):
    """A call with labels, both terms weighted, and its gradient."""

    target: Target = "dense"
    kind: str = "forward_kl"
    V: int = 32000
    dtype: torch.dtype = BF16
    temperature_on: str = "teacher"
    teacher_dtype: torch.dtype | None = None
    padding: int = 0


MAIN = [Asked(), Asked(kind="jsd"), Asked(V=8192), Asked("sparse with tail")]
SHIPPED = [
    *MAIN,
    *(Asked(kind=kind) for kind in ("reverse_kl", "tvd")),
    Asked("labels"),
    Asked("sparse", V=128256),
    Asked("argmax", "jsd"),
    *(Asked(kind=kind, temperature_on="both") for kind in ("forward_kl", "reverse_kl", "jsd", "tvd")),
    *(Asked(kind=kind, dtype=dtype) for kind in ("forward_kl", "jsd", "tvd") for dtype in (FP16, FP32)),
    *(Asked(kind=kind, V=V) for kind in ("reverse_kl", "jsd", "tvd") for V in (4096, 8192)),
    *(Asked(kind=kind, V=V) for kind in ("forward_kl", "jsd") for V in (50304, 128256)),
    *(Asked(kind=kind, V=V) for kind in ("forward_kl", "reverse_kl", "jsd", "tvd") for V in (30522, 50257)),
    *(
        Asked(kind=kind, V=30522, padding=6) for kind in ("forward_kl", "jsd")
    ),  # rows as linear_divergence has them
    *(Asked(kind=kind, V=50257, padding=47) for kind in ("forward_kl", "reverse_kl", "jsd", "tvd")),
    Asked(kind="jsd", V=50257, padding=47, temperature_on="both"),
    *(Asked(target, V=V) for target in ("labels", "sparse", "sparse with tail") for V in (30522, 50257)),
    *(Asked("labels", V=V, padding=31) for V in (8161, 31969)),
    Asked(V=30522, temperature_on="both"),
    Asked(V=8191),
    Asked(V=4096, dtype=FP32),
    Asked(teacher_dtype=FP32),
    Asked("labels", V=128256),
    Asked("labels", dtype=FP32),
    Asked("sparse", V=16384),
    Asked("sparse", temperature_on="both"),
    Asked("sparse with tail", temperature_on="both"),
    Asked("sparse with tail", V=128256, dtype=FP32),
    Asked("argmax", "forward_kl", V=16384),
    Asked("argmax", "tvd", V=128256, dtype=FP32),
]


class Report(NamedTuple):
    registers: int
    stack: int  # bytes, spills
    local_stores: int
    wide_loads: int  # of 16 bytes
    halfword_loads: int


class Absent:
    """What Triton asks of a driver before it compiles; each capability is a device of its own to its caches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 * self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compile_for() -> Iterator[Any]:
    from triton.runtime import driver

    before = driver._active
    yield lambda capability: driver.set_active(Absent(capability))
    driver._active = before


def call_of(asked: Asked) -> Any:
    """The call on tensors without memory."""
    from distill.kernels.gpu.launch import Call

    N, K = 64, 64
    empty: Any = {"device": "meta"}
    student = torch.empty(N, asked.V + asked.padding, dtype=asked.dtype, **empty)
    teacher: Any = torch.empty(N, asked.V + asked.padding, dtype=asked.teacher_dtype or asked.dtype, **empty)
    if asked.target == "labels":
        teacher = None
    elif asked.target.startswith("sparse"):
        tail = torch.empty(N, **empty) if asked.target == "sparse with tail" else None
        teacher = SparseTargets(
            torch.empty(N, K, dtype=torch.int64, **empty), torch.empty(N, K, **empty), tail
        )
    terms = resolve_terms(
        kind=asked.kind,
        beta=0.5,
        soft_weight=0.0 if asked.target == "labels" else 1.0,
        hard_weight=0.1,
        temperature=0.0 if asked.target == "argmax" else 2.0,
        temperature_on=asked.temperature_on,
        temperature_squared=False,
        vocab_size=asked.V,
    )
    labels = torch.empty(N, dtype=torch.int64, **empty)
    weights = torch.empty(N, **empty)
    return Call(student, teacher, labels, weights, terms, torch.empty_like(student))


def report_of(cubin: bytes, folder: Path) -> Report:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)

    def say(*command: str) -> str:
        return subprocess.run(
            [tools / command[0], *command[1:], path], capture_output=True, text=True, check=True
        ).stdout

    usage, code = say("cuobjdump", "--dump-resource-usage"), say("nvdisasm", "-c")
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    counts = (len(re.findall(pattern, code)) for pattern in (r"\bSTL\b", r"\bLDG\.\S*128", r"\bLDG\.\S*U16"))
    return Report(registers, stack, *counts)


def _line(asked: Asked, chosen: Plan, report: Report) -> str:
    dtype, columns = str(asked.dtype)[6:], f"V {asked.V:6}+{asked.padding:2}"
    call = f"{asked.target:16} {asked.kind:10} {dtype:8} {columns} T on {asked.temperature_on:7}"
    tile = f"{chosen.kernel:6} {chosen.block:5} x {chosen.splits:2}, {chosen.warps:2} warps"
    compiled = f"registers {report.registers:3}, spills {report.stack:2}, 16-byte loads {report.wide_loads:2}"
    in_flight = chosen.programs_at_once * chosen.block
    return f"{call} | {tile} | {compiled} | {chosen.programs_at_once:2} programs = {in_flight:5} columns"


def check(asked: Asked, capability: int, folder: Path) -> None:
    from distill.kernels.gpu.launch import row_launches, shape_of

    call = call_of(asked)
    shape = shape_of(call)
    assert shape.target == asked.target
    chosen = plan(shape, H200)
    for launch in row_launches(call, chosen, torch.empty(shape.rows, 8, device="meta")):
        compiled = launch.kernel.warmup(**launch.arguments, grid=(launch.programs,), **launch.options())
        report = report_of(compiled.asm["cubin"], folder)
        print(f"\nsm_{capability} {_line(asked, chosen, report)}", end="")
        assert report.stack == 0 and report.local_stores == 0, f"spills: {report}"
        assert report.registers <= (chosen.registers or 0), report
        assert report.wide_loads >= 2 or shape.align < 8, f"loads are not 16 bytes wide: {report}"
        # Those of labels and points.
        assert report.halfword_loads <= 4 or shape.align == 1, f"logits are read one by one: {report}"


@pytest.mark.parametrize("asked", MAIN, ids=str)
def test_main_kernels_compile_without_spills_and_with_wide_loads(
    asked: Asked, compile_for: Any, tmp_path: Path
) -> None:
    compile_for(90)
    check(asked, 90, tmp_path)


def test_the_kernel_that_scales_a_gradient_has_wide_loads(compile_for: Any, tmp_path: Path) -> None:
    from distill.kernels.gpu.scale import BLOCK, scale_kernel

    compile_for(90)
    matrix, factor = torch.empty(64, 32000, dtype=BF16, device="meta"), torch.empty((), device="meta")
    compiled = scale_kernel.warmup(matrix, 32000, 64, 32000, factor, BLOCK, grid=(64,), num_warps=8)
    report = report_of(compiled.asm["cubin"], tmp_path)
    assert report.stack == 0 and report.wide_loads >= 1 and report.halfword_loads == 0, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("asked", SHIPPED, ids=str)
def test_all_shipped_kernels_compile_without_spills_and_with_wide_loads(
    asked: Asked, capability: int, compile_for: Any, tmp_path: Path
) -> None:
    compile_for(capability)
    check(asked, capability, tmp_path)
