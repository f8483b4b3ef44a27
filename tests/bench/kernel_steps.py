"""What `kernels.py` times: our operators, their peers and their floors, each a forward and backward on the same tensors.

Liger is a peer where it is installed (`pip install --no-deps liger-kernel`), on CUDA alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import Step
from torch import Tensor

from distill.kernels import Head, divergence, linear_divergence

TEMPERATURE = 2.0
AUTO_CHUNKER = {
    "auto_chunker.enable": True,
    "auto_chunker.amplify_ratio_threshold": 1,
    "auto_chunker.num_chunk": 4,
}


def written_out(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Forward KL as anyone would write it, in float32."""
    log_p = student_NV.float().log_softmax(-1)
    return F.kl_div(log_p, (teacher_NV.float() / TEMPERATURE).softmax(-1), reduction="sum")


def in_working_dtype(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return F.kl_div(student_NV.log_softmax(-1), (teacher_NV / TEMPERATURE).softmax(-1), reduction="sum")


def jsd_written_out(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    p, q = student_NV.float().softmax(-1), (teacher_NV.float() / TEMPERATURE).softmax(-1)
    log_m = ((p + q) / 2).log()
    return (F.kl_div(log_m, q, reduction="sum") + F.kl_div(log_m, p, reduction="sum")) / 2


def tvd_written_out(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    p, q = student_NV.float().softmax(-1), (teacher_NV.float() / TEMPERATURE).softmax(-1)
    return (p - q).abs().sum() / 2


WRITTEN_OUT = {"forward_kl": written_out, "jsd": jsd_written_out, "tvd": tvd_written_out}


def kl_steps(device: str, N: int, V: int, dtype: torch.dtype, kind: str = "forward_kl") -> dict[str, Step]:
    """Divergence on given logits. `ours` writes the gradient over the student's logits; `floor` reads two
    tensors and writes one in place, the traffic that can not be avoided."""
    torch.manual_seed(0)
    source = torch.randn(N, V, device=device).to(dtype)
    student = source.clone().requires_grad_()
    teacher = torch.randn(N, V, device=device).to(dtype)
    restored = source.clone()

    def step(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def run() -> None:
            student.grad = None
            loss_of(student, teacher).backward()

        return Step(run)

    def ours(impl: str, in_place: bool) -> Callable[[Tensor, Tensor], Tensor]:
        keywords: dict[str, Any] = {
            "kind": kind,
            "temperature": TEMPERATURE,
            "impl": impl,
            "in_place": in_place,
        }
        return lambda s, t: divergence(s, t, **keywords).loss

    def over_the_logits() -> None:
        logits = restored.detach().requires_grad_()
        ours("auto", True)(logits.view_as(logits), teacher).backward()

    def restore() -> None:
        restored.detach().copy_(source)

    eager = WRITTEN_OUT[kind]
    steps = {
        "ours": Step(over_the_logits, restore),
        "new gradient": step(ours("auto", False)),
        "eager": step(eager),
        "compile": step(torch.compile(eager, dynamic=False)),
        "floor": Step(lambda: torch.add(restored, teacher, out=restored), restore),
    }
    if dtype != torch.float32 and kind == "forward_kl":
        steps["eager, working dtype"] = step(in_working_dtype)
    return steps | {name: step(loss) for name, loss in liger_on_logits(device, kind).items()}


def liger_on_logits(device: str, kind: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Liger's losses on logits: they take log-probabilities, which torch must make first."""
    if device != "cuda":
        return {}
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except ImportError:
        return {}
    kl, jsd = LigerKLDIVLoss(reduction="sum"), LigerJSD(0.5)

    def log_p(x: Tensor) -> Tensor:
        return x.log_softmax(-1, dtype=torch.float32)

    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"liger jsd": lambda s, t: jsd(log_p(s), log_p(t))}
    if kind == "forward_kl":
        found["liger"] = lambda s, t: kl(log_p(s), (t / TEMPERATURE).softmax(-1, dtype=torch.float32))
    return found


def linear_steps(
    device: str, N: int, V: int, student_width: int, teacher_width: int, dtype: torch.dtype
) -> dict[str, Step]:
    """Both heads and forward KL. `gemm` is the four matrix products alone, in our chunks and buffers."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(N, D, device=device).to(dtype) for D in (student_width, teacher_width))
    student_head, teacher_head = (
        (torch.randn(V, D, device=device) / D**0.5).to(dtype) for D in (student_width, teacher_width)
    )
    labels = torch.zeros(N, dtype=torch.int64, device=device)
    student.requires_grad_()
    student_head.requires_grad_()

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            student.grad = student_head.grad = None
            loss().backward()

        return Step(run)

    def ours() -> Tensor:
        heads = Head(student_head), Head(teacher_head)
        return linear_divergence(student, heads[0], teacher, heads[1], labels, temperature=TEMPERATURE).loss

    def both_heads(s: Tensor, w_s: Tensor, t: Tensor, w_t: Tensor) -> Tensor:
        return written_out(s @ w_s.T, t @ w_t.T)

    compiled = torch.compile(both_heads, dynamic=False)
    chunked = torch.compile(both_heads, dynamic=False, options=AUTO_CHUNKER)
    tensors = (student, student_head, teacher, teacher_head)
    steps = {
        "ours": step(ours),
        "gemm": Step(gemms(*(x.detach() for x in tensors), chunk=512 if device == "cpu" else 4096)),
        "eager": step(lambda: both_heads(*tensors)),
        "compile": step(lambda: compiled(*tensors)),
        "auto_chunker": step(lambda: chunked(*tensors)),
    }
    return steps | {name: step(loss) for name, loss in liger_linear(device, tensors, labels).items()}


def gemms(student: Tensor, w_s: Tensor, teacher: Tensor, w_t: Tensor, chunk: int) -> Callable[[], None]:
    """Both heads forward, both products of the student's backward, in chunks of rows, into given memory."""
    chunk = min(chunk, len(student))
    s_logits, t_logits = (student.new_empty(chunk, w_s.shape[0]) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(student), torch.zeros_like(w_s)

    def run() -> None:
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            s, t = s_logits[: len(student[rows])], t_logits[: len(student[rows])]
            torch.mm(student[rows], w_s.T, out=s)
            torch.mm(teacher[rows], w_t.T, out=t)
            torch.mm(s, w_s, out=d_hidden[rows])
            d_weight.addmm_(s.T, student[rows])

    return run


def masked_steps(
    device: str, N: int, V: int, student_width: int, teacher_width: int, dtype: torch.dtype, share: float
) -> dict[str, Step]:
    """MLM: the heads on the masked rows alone, and on all rows with the others ignored."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(N, D, device=device).to(dtype) for D in (student_width, teacher_width))
    student_head, teacher_head = (
        (torch.randn(V, D, device=device) / D**0.5).to(dtype) for D in (student_width, teacher_width)
    )
    labels = torch.zeros(N, dtype=torch.int64, device=device)
    rows = torch.randperm(N, device=device)[: round(share * N)]
    ignored = torch.full_like(labels, -100)
    ignored[rows] = labels[rows]

    def step(chosen: Tensor | slice, labels: Tensor) -> Step:
        leaf, weight = student.clone().requires_grad_(), student_head.clone().requires_grad_()

        def run() -> None:
            leaf.grad = weight.grad = None
            linear_divergence(
                leaf[chosen],
                Head(weight),
                teacher[chosen],
                Head(teacher_head),
                labels,
                temperature=TEMPERATURE,
            ).loss.backward()

        return Step(run)

    return {"gathered": step(rows, labels[rows]), "all rows": step(slice(None), ignored)}


def liger_linear(device: str, tensors: tuple[Tensor, ...], labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Liger's fused heads: JSD by its kernel, JSD chunked and compiled, KL from given teacher probabilities."""
    if device != "cuda":
        return {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss
    except ImportError:
        return {}
    student, w_s, teacher, w_t = tensors
    fused, kl = LigerFusedLinearJSD(jsd_beta=0.5), LigerFusedLinearKLDivLoss(reduction="sum")
    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)

    def kl_with_teacher_head() -> Tensor:
        return kl(student, w_s, (teacher @ w_t.T / TEMPERATURE).softmax(-1, dtype=torch.float32))

    return {
        "liger fused": lambda: fused(student, w_s, teacher, w_t, None),
        "liger chunked": lambda: chunked(student, w_s, teacher, w_t, labels),
        "liger fused kl": kl_with_teacher_head,
    }
