"""Heads and divergence together: linear layer and softmax of the rows in chunks, never the logits of all rows."""

from __future__ import annotations

import math

from torch import Tensor

from distill.head import Head, Mixture
from distill.kernels.checks import agreed_vocabulary, check_tensors
from distill.kernels.chunks import Job, chunked
from distill.kernels.picker import Impl
from distill.kernels.terms import (
    Divergence,
    Kind,
    SparseTargets,
    TemperatureOn,
    Terms,
    gold_as_entry,
    resolve_terms,
)

ROWS_ON_GPU, ROWS_ON_CPU = 4096, 512  # enough for the matrix products to run at full speed
LOGITS_BYTES = 2**30  # of both models' chunks together


def linear_divergence(
    student_hidden_ND: Tensor,
    student_head: Head,
    teacher_hidden_ND: Tensor | None,
    teacher_head: Head | Mixture | None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_on: TemperatureOn = "teacher",
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> Divergence:
    """`divergence(student_head(student_hidden), teacher_head(teacher_hidden), ...)` without all the logits.

    student_hidden_ND, teacher_hidden_ND: [N, D] of the dtype of their head; D, dtype and number of classes may
    differ between the two. Differentiable in the student's hidden states, weight and bias; what needs no gradient
    gets none computed. Gradients are made in forward, the weight's and the bias' summed in float32 (float64 for
    float64); backward multiplies them by the loss's gradient, once, and a GPU is never waited for.
    A teacher's head may be a Mixture of several, whose hidden states stand side by side; each adds a chunk of logits.
    chunk_rows: rows whose logits exist at once; None: 4096 on a GPU, 512 on CPU, fewer where both chunks would pass
    1 GiB. Memory beyond the gradients: a chunk of logits each, one more for a softcap of the student; on a CPU
    without 16-bit matrix products also float32 copies of 16-bit heads. Under torch.compile it runs eagerly, between
    two graphs. All else, and what is raised, as in `divergence`.
    """
    classes = None if teacher_head is None else teacher_head.num_classes
    terms = resolve_terms(
        kind=kind,
        beta=beta,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        temperature_on=temperature_on,
        temperature_squared=temperature_squared,
        vocab_size=agreed_vocabulary(student_head.weight_VD.shape[0], classes, vocab_size),
    )
    _check_head("student", student_hidden_ND, student_head)
    if teacher_hidden_ND is not None and teacher_head is not None:
        _check_teacher(teacher_hidden_ND, teacher_head)
    elif (teacher_hidden_ND is None) != (teacher_head is None):
        raise ValueError(
            "teacher_hidden_ND and teacher_head must be given together, got one without the other"
        )
    check_tensors(student_hidden_ND, teacher_hidden_ND, labels_N, weights_N, terms)
    job = Job(
        terms, impl, rows_at_once(student_hidden_ND, terms, chunk_rows), labels_N, weights_N,
        teacher_hidden_ND, teacher_head,
    )  # fmt: skip
    return chunked(student_hidden_ND, student_head, job)


def linear_sparse_divergence(
    student_hidden_ND: Tensor,
    student_head: Head,
    targets: SparseTargets,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    *,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_on: TemperatureOn = "teacher",
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    impl: Impl = "auto",
) -> Divergence:
    """`sparse_divergence(student_head(student_hidden), targets, ...)` without all the logits.

    Memory, gradients and arguments as in `linear_divergence`, the targets as in `sparse_divergence`.
    """
    terms = resolve_terms(
        kind="forward_kl",
        beta=0.5,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        temperature_on=temperature_on,
        temperature_squared=temperature_squared,
        vocab_size=agreed_vocabulary(student_head.weight_VD.shape[0], None, vocab_size),
    )
    _check_head("student", student_hidden_ND, student_head)
    check_tensors(student_hidden_ND, targets, labels_N, weights_N, terms)
    job = Job(
        terms, impl, rows_at_once(student_hidden_ND, terms, chunk_rows), labels_N, weights_N,
        targets=gold_as_entry(targets, labels_N),
    )  # fmt: skip
    return chunked(student_hidden_ND, student_head, job)


def _check_teacher(hidden_ND: Tensor, head: Head | Mixture) -> None:
    if isinstance(head, Head):
        return _check_head("teacher", hidden_ND, head)
    width = sum(member.weight_VD.shape[1] for member in head.heads) + len(head.heads)
    if hidden_ND.dim() != 2 or hidden_ND.shape[1] != width or not hidden_ND.is_floating_point():
        found = f"{hidden_ND.dtype} {tuple(hidden_ND.shape)}"
        raise ValueError(
            f"teacher_hidden_ND of these {len(head.heads)} heads must be [N, {width}], got {found}"
        )
    for number, (part, member) in enumerate(zip(head.split(hidden_ND)[0], head.heads, strict=True)):
        _check_head(f"teacher member {number}", part, member)
        if member.num_classes < head.vocab_size:
            raise ValueError(
                f"teacher member {number} has {member.num_classes} classes, the mixture {head.vocab_size}: they must "
                "have the vocabulary in common"
            )


def _check_head(name: str, hidden_ND: Tensor, head: Head) -> None:
    weight, bias, softcap = head
    if hidden_ND.dim() != 2 or not hidden_ND.is_floating_point():
        found = f"{hidden_ND.dtype} {tuple(hidden_ND.shape)}"
        raise ValueError(f"{name}_hidden_ND must be a floating tensor [N, D], got {found}")
    num_classes, width = weight.shape[0], hidden_ND.shape[1]
    for part, tensor, shape in (("weight_VD", weight, [num_classes, width]), ("bias_V", bias, [num_classes])):
        if tensor is None:
            continue
        wanted = f"{hidden_ND.dtype} {shape} on {hidden_ND.device}"
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        if wanted != found:
            raise ValueError(f"{name}_head.{part} must be {wanted}, as the hidden states are, got {found}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}_head.softcap must be a finite number above 0 or None, got {softcap}")


def rows_at_once(hidden_ND: Tensor, terms: Terms, chunk_rows: int | None) -> int:
    """Rows of a chunk: as asked for, else by device and vocabulary. Raises ValueError for less than one."""
    if chunk_rows is None:
        most = ROWS_ON_CPU if hidden_ND.device.type == "cpu" else ROWS_ON_GPU
        fit = LOGITS_BYTES // (2 * terms.vocab_size * hidden_ND.element_size())
        chunk_rows = max(128, min(most, fit // 128 * 128))
    if not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be a whole number of at least 1, got {chunk_rows}")
    return max(1, min(chunk_rows, hidden_ND.shape[0]))
