"""The divergences written out once more, as anyone would: the truth in float64, the budget in float32.

An implementation may be off by what the naive computation in float32 is off, plus the rounding of its result.
That is stricter than the naive result in the dtype of the logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.kernels import SparseTargets, divergence, sparse_divergence

# Relative rounding of a gradient: the kernel's result and its product with the upstream gradient.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SMALLEST = {torch.float32: 1e-9, torch.float16: 2**-23, torch.bfloat16: 1e-9}  # float16 has few small numbers

HARD_ALONE: dict[str, Any] = {"soft_weight": 0.0, "hard_weight": 1.0}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "forward_kl": [
        {},
        {"temperature": 1e-5, "temperature_on": "both", "temperature_squared": True},
        {"temperature": 0.5, "hard_weight": 0.3},
        {"temperature": 4.0, "temperature_on": "both", "temperature_squared": True, "soft_weight": 0.7},
        {"temperature": 1e-5, "soft_weight": 0.2, "hard_weight": 0.8},
        {"temperature": 0.5, "temperature_on": "both", "hard_weight": 0.3},
        HARD_ALONE,
    ],
    "reverse_kl": [
        {},
        {"temperature": 0.5, "hard_weight": 0.3},
        {"temperature": 4.0, "temperature_on": "both", "temperature_squared": True},
    ],
    "jsd": [
        {"beta": 0.5},
        {"beta": 0.1, "temperature": 1e-5, "hard_weight": 0.3},
        {"beta": 0.9, "temperature": 4.0, "temperature_on": "both", "temperature_squared": True},
        {"beta": 0.3, "temperature": 0.5, "soft_weight": 0.7},
    ],
    "tvd": [
        {},
        {"temperature": 1e-5, "temperature_on": "both"},
        {"temperature": 4.0, "temperature_on": "both", "hard_weight": 0.3},
        {"temperature": 0.5, "soft_weight": 0.7},
    ],
}


class Case(NamedTuple):
    """Rows of logits with padding columns that would win if they were read, labels and weights."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    weights: Tensor | None
    vocab_size: int


def make_case(N: int, V: int, dtype: torch.dtype, *, weighted: bool = False, device: str = "cpu") -> Case:
    padding = 3 if V % 2 else 0
    student, teacher = (torch.randn(N, V + padding) * 3 for _ in range(2))
    student[:, V:], teacher[:, V:] = 77.0, 99.0
    labels = torch.randint(0, V, (N,))
    labels[1::3] = -100
    weights = torch.rand(N) if weighted else None
    if weights is not None:
        weights[2::5] = 0.0
    to = [
        None if x is None else x.to(device) for x in (student.to(dtype), teacher.to(dtype), labels, weights)
    ]
    return Case(*to, V)  # type: ignore[arg-type]


def written_out(case: Case, student: Tensor, settings: dict[str, Any]) -> Tensor:
    """The loss in the dtype of `student`."""
    return _loss(case, student, settings, lambda s, keep: _dense(case, s, keep, settings))


def sparse_written_out(
    case: Case, targets: SparseTargets, student: Tensor, settings: dict[str, Any]
) -> Tensor:
    return _loss(case, student, settings, lambda s, keep: _sparse(targets, s, keep, settings))


def _loss(
    case: Case, student: Tensor, settings: dict[str, Any], soft: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    keep = case.labels != -100
    student = student[keep, : case.vocab_size]
    temperature = settings.get("temperature", 1.0)
    scale = temperature**2 if settings.get("temperature_squared") and temperature >= 1e-4 else 1.0
    rows = settings.get("soft_weight", 1.0) * scale * soft(student, keep)
    rows = rows + settings.get("hard_weight", 0.0) * F.cross_entropy(
        student, case.labels[keep], reduction="none"
    )
    return (rows if case.weights is None else rows * case.weights[keep]).sum()


def _student_log_probs(student: Tensor, settings: dict[str, Any]) -> Tensor:
    temperature = settings.get("temperature", 1.0)
    divided = settings.get("temperature_on") == "both" and temperature >= 1e-4
    return torch.log_softmax(student / (temperature if divided else 1.0), -1)


def _dense(case: Case, student: Tensor, keep: Tensor, settings: dict[str, Any]) -> Tensor:
    kind, temperature = settings.get("kind", "forward_kl"), settings.get("temperature", 1.0)
    log_p = _student_log_probs(student, settings)
    teacher = case.teacher[keep, : case.vocab_size].to(student.dtype)
    if temperature < 1e-4:
        q = F.one_hot(teacher.argmax(-1), teacher.shape[-1]).to(student.dtype)
    else:
        q = torch.softmax(teacher / temperature, -1)
    if kind == "forward_kl":
        return F.kl_div(log_p, q, reduction="none").sum(-1)
    p = log_p.exp()
    if kind == "reverse_kl":
        return (p * (log_p - torch.log_softmax(teacher / temperature, -1))).sum(-1)
    if kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    beta = settings["beta"]
    log_m = (beta * q + (1 - beta) * p).log()
    teachers, students = (F.kl_div(log_m, x, reduction="none").sum(-1) for x in (q, p))
    return beta * teachers + (1 - beta) * students


def _sparse(targets: SparseTargets, student: Tensor, keep: Tensor, settings: dict[str, Any]) -> Tensor:
    p = _student_log_probs(student, settings).exp()
    p_k = p.gather(1, targets.ids_NK[keep])
    loss = F.kl_div(p_k.log(), targets.probs_NK[keep].to(p.dtype), reduction="none").sum(-1)
    if targets.tail_N is None:
        return loss
    others = p.scatter(1, targets.ids_NK[keep], 0.0).sum(-1)  # ids are distinct
    return loss + F.kl_div(others.log(), targets.tail_N[keep].to(p.dtype), reduction="none")


def top_k_targets(case: Case, k: int, *, tail: bool) -> SparseTargets:
    """The teacher's k most probable classes."""
    q = torch.softmax(case.teacher[:, : case.vocab_size].double(), -1)
    probs, ids = q.topk(k, -1)
    tail_N = (1 - probs.sum(-1)).clamp(min=0).float() if tail else None
    return SparseTargets(ids, probs.float(), tail_N)


def loss_and_grad(
    loss_of: Callable[[Tensor], Tensor], student: Tensor, upstream: float = 0.37
) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient under an upstream gradient, in float64."""
    leaf = student.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach().double(), grad.double()


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_true_to_float64(
    case: Case, settings: dict[str, Any], impl: str, targets: SparseTargets | None = None
) -> None:
    """`impl` within its budget, in loss and gradient; zero gradient where nothing counts."""

    def naive(student: Tensor) -> Tensor:
        if targets is None:
            return written_out(case, student, settings)
        return sparse_written_out(case, targets, student, settings)

    def kernel(student: Tensor) -> Tensor:
        common: dict[str, Any] = {"vocab_size": case.vocab_size, "impl": impl, **settings}
        if targets is None:
            return divergence(student, case.teacher, case.labels, case.weights, **common).loss
        return sparse_divergence(student, targets, case.labels, case.weights, **common).loss

    upstream = random.Random(f"{settings} {case.student.shape}").uniform(-2, 2)
    truth, true_grad = loss_and_grad(naive, case.student.double(), upstream)
    naive_loss, naive_grad = loss_and_grad(naive, case.student.float(), upstream)
    loss, grad = loss_and_grad(kernel, case.student, upstream)
    size = largest(true_grad)
    # A gradient is a difference of terms as large as the probabilities: each brings its rounding in float32.
    probabilities = case.student[:, : case.vocab_size].float().softmax(-1)
    cancelled = abs(upstream) * torch.finfo(torch.float32).eps * largest(probabilities)
    loss_budget = (naive_loss - truth).abs() + 1e-6 * (1 + truth.abs())
    dtype = case.student.dtype
    grad_budget = largest(naive_grad - true_grad) + ROUNDING[dtype] * size + cancelled + SMALLEST[dtype]
    shown = f"{impl} {settings} {list(case.student.shape)} {dtype}"
    assert (loss - truth).abs() <= loss_budget, f"{shown}: loss {loss}, naive {naive_loss}, truth {truth}"
    assert largest(grad - true_grad) <= grad_budget, (
        f"{shown}: gradient off by {largest(grad - true_grad):.2e}, naive {largest(naive_grad - true_grad):.2e}, "
        f"size {size:.2e}"
    )
    assert largest(grad[:, case.vocab_size :]) == 0 and largest(grad[case.labels == -100]) == 0
    if case.weights is not None:
        assert largest(grad[case.weights == 0]) == 0
