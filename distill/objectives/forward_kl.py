"""Forward KL from the teacher, mixed with hard labels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distill.config import ObjectiveConfig
from distill.kernels import Divergence, linear_divergence
from distill.models import Rows


def forward_kl(
    student: Rows,
    teacher: Rows | None,
    labels_N: Tensor,
    config: ObjectiveConfig,
    weights: Mapping[str, float],
    temperature: float,
    vocab_size: int,
) -> Divergence:
    """w_kl * sum_n KL(p_teacher^tau || p_student) + w_hard * sum_n CE(label_n, p_student).

    Soft cross-entropy is reported apart. Panigrahi et al. (ICLR 2025), section 2: teacher first, temperature
    on the teacher alone unless config says `both`.
    Rows hold N hidden states; labels_N int64. Returns sums over rows, never means.
    """
    return linear_divergence(
        student.hidden_ND,
        student.head,
        teacher.hidden_ND if teacher else None,
        teacher.head if teacher else None,
        labels_N,
        chunk_rows=config.chunk_rows,
        kl_weight=weights.get("forward_kl", 0.0),
        hard_weight=weights.get("hard", 0.0),
        temperature=temperature,
        temperature_on=config.temperature_on,  # type: ignore[arg-type]  # checked by config
        temperature_squared=config.temperature_squared,
        vocab_size=vocab_size,
        impl=config.kernel,  # type: ignore[arg-type]
    )
