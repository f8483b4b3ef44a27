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


class Shape(NamedTuple):
    """A call with labels, both terms weighted, and its gradient."""

    target: Target = "dense"
    kind: str = "forward_kl"
    V: int = 32000
    dtype: torch.dtype = BF16
    temperature_on: str = "teacher"
    teacher_dtype: torch.dtype | None = None


MAIN = [Shape(), Shape(kind="jsd"), Shape(V=8192), Shape("sparse with tail")]
SHIPPED = [
    *MAIN,
    *(Shape(kind=kind) for kind in ("reverse_kl", "tvd")),
    Shape("labels"),
    Shape("sparse", V=128256),
    Shape("argmax", "jsd"),
    *(Shape(kind=kind, temperature_on="both") for kind in ("forward_kl", "reverse_kl", "jsd", "tvd")),
    *(Shape(kind=kind, dtype=dtype) for kind in ("forward_kl", "jsd", "tvd") for dtype in (FP16, FP32)),
    *(Shape(kind=kind, V=V) for kind in ("reverse_kl", "jsd", "tvd") for V in (4096, 8192)),
    *(Shape(kind=kind, V=V) for kind in ("forward_kl", "jsd") for V in (50304, 128256)),
    Shape(V=4096, dtype=FP32),
    Shape(teacher_dtype=FP32),
    Shape("labels", V=128256),
    Shape("labels", dtype=FP32),
    Shape("sparse", V=16384),
    Shape("sparse", temperature_on="both"),
    Shape("sparse with tail", temperature_on="both"),
    Shape("sparse with tail", V=128256, dtype=FP32),
    Shape("argmax", "forward_kl", V=16384),
    Shape("argmax", "tvd", V=128256, dtype=FP32),
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


def launches(shape: Shape, chosen: Plan) -> list[Any]:
    from distill.kernels.gpu.launch import Call, row_launches

    N, K = 64, 64
    empty: Any = {"device": "meta"}
    student = torch.empty(N, shape.V, dtype=shape.dtype, **empty)
    teacher: Any = torch.empty(N, shape.V, dtype=shape.teacher_dtype or shape.dtype, **empty)
    if shape.target == "labels":
        teacher = None
    elif shape.target.startswith("sparse"):
        tail = torch.empty(N, **empty) if shape.target == "sparse with tail" else None
        teacher = SparseTargets(
            torch.empty(N, K, dtype=torch.int64, **empty), torch.empty(N, K, **empty), tail
        )
    terms = resolve_terms(
        kind=shape.kind,
        beta=0.5,
        soft_weight=0.0 if shape.target == "labels" else 1.0,
        hard_weight=0.1,
        temperature=0.0 if shape.target == "argmax" else 2.0,
        temperature_on=shape.temperature_on,
        temperature_squared=False,
        vocab_size=shape.V,
    )
    labels = torch.empty(N, dtype=torch.int64, **empty)
    weights = torch.empty(N, **empty)
    call = Call(student, teacher, labels, weights, terms, torch.empty_like(student))
    assert call.target == shape.target
    return list(row_launches(call, chosen, torch.empty(N, 8, **empty)))


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


def _line(shape: Shape, chosen: Plan, report: Report) -> str:
    asked = f"{shape.target:16} {shape.kind:10} {str(shape.dtype)[6:]:8} V {shape.V:6} T on {shape.temperature_on:7}"
    tile = f"{chosen.kernel:6} {chosen.block:5} x {chosen.splits:2}, {chosen.warps:2} warps"
    compiled = f"registers {report.registers:3}, spills {report.stack:2}, 16-byte loads {report.wide_loads:2}"
    columns = chosen.programs_at_once * chosen.block
    return f"{asked} | {tile} | {compiled} | {chosen.programs_at_once:2} programs = {columns:5} columns"


def check(shape: Shape, capability: int, folder: Path) -> None:
    widest = max(shape.dtype, shape.teacher_dtype or shape.dtype, key=lambda dtype: dtype.itemsize)
    chosen = plan(shape.target, shape.kind, widest.itemsize, shape.V, 8192, H200)
    for launch in launches(shape, chosen):
        compiled = launch.kernel.warmup(**launch.arguments, grid=(launch.programs,), **launch.options())
        report = report_of(compiled.asm["cubin"], folder)
        print(f"\nsm_{capability} {_line(shape, chosen, report)}", end="")
        assert report.stack == 0 and report.local_stores == 0, f"spills: {report}"
        assert report.registers <= (chosen.registers or 0), report
        assert report.wide_loads >= 2, f"loads are not 16 bytes wide: {report}"
        assert report.halfword_loads <= 4, f"logits are read one by one: {report}"  # of labels and points


@pytest.mark.parametrize("shape", MAIN, ids=str)
def test_main_kernels_compile_without_spills_and_with_wide_loads(
    shape: Shape, compile_for: Any, tmp_path: Path
) -> None:
    compile_for(90)
    check(shape, 90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize("shape", SHIPPED, ids=str)
def test_all_shipped_kernels_compile_without_spills_and_with_wide_loads(
    shape: Shape, capability: int, compile_for: Any, tmp_path: Path
) -> None:
    compile_for(capability)
    check(shape, capability, tmp_path)
