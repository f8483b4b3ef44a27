"""Soft labels from the teacher, mixed with hard labels, in one pass over the logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distill.config import ObjectiveConfig
from distill.kernels import Divergence, linear_divergence
from distill.models import Rows

HARD = "hard"


def soft_and_hard_labels(
    student: Rows,
    teacher: Rows | None,
    labels_N: Tensor,
    config: ObjectiveConfig,
    weights: Mapping[str, float],
    temperature: float,
    vocab_size: int,
) -> Divergence:
    """w_soft * sum_n D(p_teacher^tau, p_student) + w_hard * sum_n CE(label_n, p_student).

    D is the one divergence named in `weights` beside `hard`: forward_kl (Panigrahi et al., ICLR 2025, section 2:
    teacher first, temperature on the teacher alone unless config says `both`), reverse_kl (MiniLLM, ICLR 2024),
    jsd with config.beta (GKD, ICLR 2024) or tvd (Wen et al., ACL 2023). Formulas: `distill.kernels`.
    Rows hold N hidden states; labels_N int64. Returns sums over rows, never means.
    """
    kind = soft_kind(weights)
    return linear_divergence(
        student.hidden_ND,
        student.head,
        teacher.hidden_ND if teacher else None,
        teacher.head if teacher else None,
        labels_N,
        kind=kind or "forward_kl",  # type: ignore[arg-type]  # checked by config
        beta=config.beta,
        soft_weight=weights[kind] if kind else 0.0,
        hard_weight=weights.get(HARD, 0.0),
        temperature=temperature,
        temperature_on=config.temperature_on,  # type: ignore[arg-type]
        temperature_squared=config.temperature_squared,
        vocab_size=vocab_size,
        chunk_rows=config.chunk_rows or None,
        impl=config.kernel,  # type: ignore[arg-type]
    )


def soft_kind(weights: Mapping[str, float]) -> str | None:
    """The divergence from the teacher that `weights` names; None for hard labels alone.

    Raises:
        ValueError: several, which one pass can not serve.
    """
    kinds = [name for name in weights if name != HARD]
    if len(kinds) > 1:
        raise ValueError(f"one divergence from the teacher at a time, got {' and '.join(kinds)}: keep one")
    return kinds[0] if kinds else None
