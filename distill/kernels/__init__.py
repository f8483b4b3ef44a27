"""Divergence of a student from a teacher and from hard labels: one public function a computation.

`divergence` takes both logits, `sparse_divergence` the student's logits and stored targets; `linear_divergence` and
`linear_sparse_divergence` take hidden states and heads, and never hold all logits.

With q = softmax(t / T) and p = softmax(s / T) for temperature_on="both" or softmax(s) for "teacher":

    loss = sum over rows n with label != -100 of
           weight_n * ( soft_weight * (T^2 if temperature_squared else 1) * D(q_n, p_n)
                        + hard_weight * CE(label_n, softmax(s_n)) )

    forward_kl   D = KL(q || p), the teacher first          (Hinton et al. 2015; Panigrahi et al., ICLR 2025, section 2)
    reverse_kl   D = KL(p || q)                             (Gu et al., MiniLLM, ICLR 2024)
    jsd          D = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; beta 0 and 1 are the forward
                 and the reverse KL                         (Agarwal et al., GKD, ICLR 2024)
    tvd          D = 1/2 sum |p - q|                        (Wen et al., f-divergence distillation, ACL 2023)

Below T = 1e-4 the teacher is the one-hot of its arg-max (the first of equals), the student keeps temperature 1 and
T^2 is left out. Columns from `vocab_size` on are padding: -inf on both sides, zero gradient. A weight of 0 switches
its term or row off, even where it is infinite. Softmax and sums are made in float32 or better whatever the dtype.
Suffixes: N rows, V vocabulary, D width, K kept classes.
"""

from __future__ import annotations

from torch import Tensor

from distill.head import Head
from distill.kernels.autograd import differentiable
from distill.kernels.checks import check_tensors, real_vocabulary
from distill.kernels.linear import linear_divergence, linear_sparse_divergence
from distill.kernels.picker import Impl, pick
from distill.kernels.reference import reference_divergence, reference_value_and_grad
from distill.kernels.terms import (
    IGNORED_LABEL,
    Divergence,
    Kind,
    SparseTargets,
    TemperatureOn,
    Terms,
    gold_as_entry,
    resolve_terms,
)

__all__ = [
    "IGNORED_LABEL",
    "Divergence",
    "Head",
    "SparseTargets",
    "divergence",
    "linear_divergence",
    "linear_sparse_divergence",
    "sparse_divergence",
]


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
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
    in_place: bool = False,
    impl: Impl = "auto",
) -> Divergence:
    """The formula of the module's docstring.

    student_logits_NV, teacher_logits_NV: [N, >= vocab_size] bf16, fp16, fp32 (fp64: the reference), not
    necessarily of one dtype. labels_N: int64, -100 is ignored. weights_N: float32, for `loss` alone.
    Without labels every row counts and `hard`, `num_correct` are 0; without a teacher `soft`, `soft_ce` are 0.
    in_place: the student's logits become their gradient, no [N, V] is allocated; they must come from an operation
    that does not need them for its own backward, as a linear layer. Left out under torch.compile.
    A row whose logits hold NaN, +inf or nothing but -inf makes the loss NaN.
    Raises ValueError for shapes, dtypes, labels or settings that do not fit together.
    """
    terms = resolve_terms(
        kind=kind,
        beta=beta,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        temperature_on=temperature_on,
        temperature_squared=temperature_squared,
        vocab_size=real_vocabulary(student_logits_NV, teacher_logits_NV, vocab_size),
    )
    return _divergence(student_logits_NV, teacher_logits_NV, labels_N, weights_N, terms, in_place, impl)


def sparse_divergence(
    student_logits_NV: Tensor,
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
    in_place: bool = False,
    impl: Impl = "auto",
) -> Divergence:
    """Forward KL from stored targets q_k; the student's side is exact, over the whole vocabulary.

    D = sum_k q_k (log q_k - log p_k), and with a tail t also t (log t - log(1 - sum_k p_k)): the KL divergence of
    the K + 1 buckets. Without a tail and with sum_k q_k < 1 it is not normalised; its gradient is
    p * sum_k q_k - q. temperature is the one at which the targets were made: with temperature_on="both" the
    student is divided by it, with "teacher" it only enters T^2. All else as in `divergence`.
    """
    terms = resolve_terms(
        kind="forward_kl",
        beta=0.5,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        temperature_on=temperature_on,
        temperature_squared=temperature_squared,
        vocab_size=real_vocabulary(student_logits_NV, None, vocab_size),
    )
    return _divergence(student_logits_NV, targets, labels_N, weights_N, terms, in_place, impl)


def _divergence(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
    in_place: bool,
    impl: Impl,
) -> Divergence:
    check_tensors(student_NV, teacher, labels_N, weights_N, terms)
    if in_place and student_NV.is_leaf and student_NV.requires_grad:
        raise ValueError(
            "in_place would write over a leaf, got logits that no operation made: leave in_place out"
        )
    if isinstance(teacher, SparseTargets):
        teacher = gold_as_entry(teacher, labels_N)
    chosen = pick(impl, student_NV, teacher)
    if chosen is reference_value_and_grad:  # by autograd, so that it can be differentiated twice
        return reference_divergence(student_NV, teacher, labels_N, weights_N, terms)
    return differentiable(chosen, student_NV, teacher, labels_N, weights_N, terms, in_place)
