"""Divergence of a student from a teacher and from hard labels: one public function a computation.

`divergence` takes logits; `linear_divergence` takes hidden states and heads and never holds all logits.
With q = softmax(t / T), p = softmax(s / T) for temperature_on="both" or softmax(s) for "teacher":

    loss = sum over rows n with label != -100 of
           kl_weight * (T^2 if temperature_squared else 1) * KL(q_n || p_n)
           + hard_weight * CE(label_n, softmax(s_n))

KL has the teacher first. Below T = 1e-4 the teacher is the one-hot of its arg-max (the first of equals), the
student keeps temperature 1 and T^2 is left out. Columns from `vocab_size` on are padding: -inf on both sides,
zero gradient. Weights of 0 switch a term off, even where it is infinite.
Suffixes: N rows, V vocabulary, D width.
"""

from __future__ import annotations

from torch import Tensor

from distill.kernels.checks import check_tensors, real_vocabulary
from distill.kernels.linear import Head, chunked_divergence
from distill.kernels.picker import Impl, pick
from distill.kernels.terms import IGNORED_LABEL, Divergence, TemperatureOn, resolve_terms

__all__ = ["IGNORED_LABEL", "Divergence", "divergence", "linear_divergence"]


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    labels_N: Tensor | None,
    *,
    kl_weight: float = 1.0,
    hard_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_on: TemperatureOn = "teacher",
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> Divergence:
    """The formula of the module's docstring, computed in float32 or better whatever the dtype of the logits.

    Without labels every row counts and `hard`, `num_correct` are 0; without a teacher `kl`, `soft_ce` are 0.
    A row whose student logits hold NaN, +inf or nothing but -inf makes the loss NaN.
    Raises ValueError for shapes, dtypes, labels or settings that do not fit together.
    """
    terms = resolve_terms(
        kl_weight=kl_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        temperature_on=temperature_on,
        temperature_squared=temperature_squared,
        vocab_size=real_vocabulary(student_logits_NV, teacher_logits_NV, vocab_size),
    )
    check_tensors(student_logits_NV, teacher_logits_NV, labels_N, terms)
    return pick(impl, student_logits_NV, teacher_logits_NV)(
        student_logits_NV, teacher_logits_NV, labels_N, terms
    )


def linear_divergence(
    student_hidden_ND: Tensor,
    student_head: Head,
    teacher_hidden_ND: Tensor | None,
    teacher_head: Head | None,
    labels_N: Tensor,
    *,
    chunk_rows: int = 1024,
    kl_weight: float = 1.0,
    hard_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_on: TemperatureOn = "teacher",
    temperature_squared: bool = False,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> Divergence:
    """`divergence(student_head(student_hidden), teacher_head(teacher_hidden), labels)` in chunks of rows.

    With more than one chunk, backward computes each chunk's logits again instead of keeping them (one more
    forward of both heads); with one chunk nothing is computed twice. The teacher's head has no gradients.
    Heads map hidden [n, D] to logits [n, V]. Raises ValueError as `divergence` does.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if (teacher_hidden_ND is None) != (teacher_head is None):
        raise ValueError("teacher_hidden_ND and teacher_head must be given together")
    if labels_N.shape != student_hidden_ND.shape[:1]:
        raise ValueError(f"labels {tuple(labels_N.shape)} do not fit hidden {tuple(student_hidden_ND.shape)}")

    def one_chunk(student_NV: Tensor, teacher_NV: Tensor | None, labels: Tensor) -> Divergence:
        return divergence(
            student_NV,
            teacher_NV,
            labels,
            kl_weight=kl_weight,
            hard_weight=hard_weight,
            temperature=temperature,
            temperature_on=temperature_on,
            temperature_squared=temperature_squared,
            vocab_size=vocab_size,
            impl=impl,
        )

    teacher = None
    if teacher_hidden_ND is not None and teacher_head is not None:
        teacher = (teacher_hidden_ND, teacher_head)
    return chunked_divergence(one_chunk, (student_hidden_ND, student_head), teacher, labels_N, chunk_rows)
