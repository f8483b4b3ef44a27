"""What `kernels.py` times: our operators, their peers and their floors, each a forward and backward on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernel_liger import liger_linear, liger_on_logits
from measure import Step
from torch import Tensor

from distill.kernels import Head, divergence, linear_divergence
from distill.kernels.linear import rows_at_once
from distill.kernels.terms import Terms, resolve_terms

TEMPERATURE = 2.0
AUTO_CHUNKER = {
    "auto_chunker.enable": True,
    "auto_chunker.amplify_ratio_threshold": 1,
    "auto_chunker.num_chunk": 4,
}


def terms_of(V: int, kind: str = "forward_kl") -> Terms:
    """The settings of everything that is timed."""
    return resolve_terms(
        kind=kind, beta=0.5, soft_weight=1.0, hard_weight=0.0, temperature=TEMPERATURE,
        temperature_on="teacher", temperature_squared=False, vocab_size=V,
    )  # fmt: skip


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


def backward_step(loss_of: Callable[[], Tensor], *leaves: Tensor, may_fail: bool = False) -> Step:
    """Forward and backward. Gradients of the run before are dropped untimed, so that a run makes its own."""

    def drop_gradients() -> None:
        for leaf in leaves:
            leaf.grad = None

    return Step(lambda: loss_of().backward(), drop_gradients, may_fail)


def kl_steps(device: str, N: int, V: int, dtype: torch.dtype, kind: str = "forward_kl") -> dict[str, Step]:
    """Divergence on given logits. `ours` writes the gradient over the student's logits; `floor` reads two
    tensors and writes one in place, the traffic that can not be avoided."""
    torch.manual_seed(0)
    source = torch.randn(N, V, device=device).to(dtype)
    student = source.clone().requires_grad_()
    teacher = torch.randn(N, V, device=device).to(dtype)
    restored = source.clone()
    settings: dict[str, Any] = {"kind": kind, "temperature": TEMPERATURE}

    def over_the_logits() -> None:
        logits = restored.detach().requires_grad_()
        divergence(logits.view_as(logits), teacher, in_place=True, **settings).loss.backward()

    def restore() -> None:
        restored.copy_(source)

    eager = WRITTEN_OUT[kind]
    peers = {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    if dtype != torch.float32 and kind == "forward_kl":
        peers["eager, working dtype"] = in_working_dtype
    if device == "cuda":
        peers |= liger_on_logits(V, kind, TEMPERATURE)
    return {
        "ours": Step(over_the_logits, restore),
        "new gradient": backward_step(lambda: divergence(student, teacher, **settings).loss, student),
        "floor": Step(lambda: torch.add(restored, teacher, out=restored), restore),
    } | {
        name: backward_step(lambda loss=loss: loss(student, teacher), student, may_fail=True)
        for name, loss in peers.items()
    }


class Heads(NamedTuple):
    """Hidden states and heads of both models; the student's learn."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor


def make_heads(
    device: str, N: int, V: int, student_width: int, teacher_width: int, dtype: torch.dtype
) -> Heads:
    torch.manual_seed(0)
    widths = student_width, teacher_width
    student, teacher = (torch.randn(N, D, device=device).to(dtype) for D in widths)
    heads = [(torch.randn(V, D, device=device) / D**0.5).to(dtype) for D in widths]
    return Heads(student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1])


def both_heads(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    return written_out(student @ student_head.T, teacher @ teacher_head.T)


def linear_steps(
    device: str, N: int, V: int, student_width: int, teacher_width: int, dtype: torch.dtype
) -> dict[str, Step]:
    """Both heads and forward KL. `gemm` is the four matrix products alone, in our chunks and buffers."""
    data = make_heads(device, N, V, student_width, teacher_width, dtype)
    labels = torch.zeros(N, dtype=torch.int64, device=device)

    def ours() -> Tensor:
        return fused(data.student, data.student_head, data.teacher, data.teacher_head, labels)

    compiled = torch.compile(both_heads, dynamic=False)
    chunked = torch.compile(both_heads, dynamic=False, options=AUTO_CHUNKER)
    peers: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: both_heads(*data),
        "compile": lambda: compiled(*data),
    }
    if device == "cuda":
        peers |= liger_linear(*data, labels, TEMPERATURE)
    peers["auto_chunker"] = lambda: chunked(*data)
    leaves = data.student, data.student_head
    return {"ours": backward_step(ours, *leaves), "gemm": Step(products_alone(data))} | {
        name: backward_step(loss, *leaves, may_fail=True) for name, loss in peers.items()
    }


def fused(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor
) -> Tensor:
    heads = Head(student_head), Head(teacher_head)
    return linear_divergence(student, heads[0], teacher, heads[1], labels, temperature=TEMPERATURE).loss


def products_alone(data: Heads) -> Callable[[], None]:
    """Both heads forward, both products of the student's backward, into given memory; the weight's gradient is
    summed in float32, as ours is."""
    student, w_s, teacher, w_t = (x.detach() for x in data)
    chunk = rows_at_once(student, terms_of(len(w_s)), None)
    s_logits, t_logits = (student.new_empty(chunk, len(w_s)) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(student), torch.zeros_like(w_s, dtype=torch.float32)
    room = torch.empty_like(w_s) if not w_s.is_cuda and w_s.dtype != torch.float32 else None

    def add_outer(grad: Tensor, hidden: Tensor) -> None:
        if grad.dtype == torch.float32:
            d_weight.addmm_(grad.T, hidden)
        elif room is None:
            torch.addmm(d_weight, grad.T, hidden, out_dtype=torch.float32, out=d_weight)
        else:  # no product on CPU reads 16 bits and writes 32
            d_weight.add_(torch.mm(grad.T, hidden, out=room))

    def run() -> None:
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            s, t = s_logits[: len(student[rows])], t_logits[: len(student[rows])]
            torch.mm(student[rows], w_s.T, out=s)
            torch.mm(teacher[rows], w_t.T, out=t)
            torch.mm(s, w_s, out=d_hidden[rows])
            add_outer(s, student[rows])

    return run


def masked_steps(
    device: str, N: int, V: int, student_width: int, teacher_width: int, dtype: torch.dtype, share: float
) -> dict[str, Step]:
    """MLM: the heads on the masked rows alone, and on all rows with the others ignored."""
    data = make_heads(device, N, V, student_width, teacher_width, dtype)
    labels = torch.zeros(N, dtype=torch.int64, device=device)
    rows = torch.randperm(N, device=device)[: round(share * N)]
    ignored = torch.full_like(labels, -100)
    ignored[rows] = labels[rows]

    def step(chosen: Tensor | slice, labels: Tensor) -> Step:
        student, w_s, teacher, w_t = data
        return backward_step(lambda: fused(student[chosen], w_s, teacher[chosen], w_t, labels), student, w_s)

    return {"gathered": step(rows, labels[rows]), "all rows": step(slice(None), ignored)}
