"""Soft labels from the teacher, mixed with hard labels, in one pass over the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distill.config import FUSED, ObjectiveConfig
from distill.head import Pooled
from distill.kernels import Divergence, SparseTargets, linear_divergence, linear_sparse_divergence
from distill.models import Rows
from distill.targets.codecs import Codec

HARD = "hard"
FROM_FEW_CLASSES = "forward_kl"  # the one divergence that targets cut to few classes can serve


def soft_and_hard_labels(
    student: Rows,
    teacher: Rows | Pooled | SparseTargets | None,
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
    Rows hold N hidden states; labels_N int64. Returns sums over rows, never means. Of stored targets that were cut to
    few classes there is forward_kl alone.
    """
    kind = soft_kind(weights)
    common: dict[str, Any] = {
        "soft_weight": weights[kind] if kind else 0.0,
        "hard_weight": weights.get(HARD, 0.0),
        "temperature": temperature,
        "temperature_on": config.temperature_on,
        "temperature_squared": config.temperature_squared,
        "vocab_size": vocab_size,
        "chunk_rows": config.chunk_rows or None,
        "impl": config.kernel,
    }
    if isinstance(teacher, SparseTargets):
        if kind not in (None, FROM_FEW_CLASSES):
            raise ValueError(f"targets cut to few classes serve {FROM_FEW_CLASSES} alone, got {kind}")
        return linear_sparse_divergence(student.hidden_ND, student.head, teacher, labels_N, **common)
    return linear_divergence(
        student.hidden_ND,
        student.head,
        teacher.hidden_ND if teacher else None,
        teacher.head if teacher else None,
        labels_N,
        kind=kind or "forward_kl",  # type: ignore[arg-type]  # checked by config
        beta=config.beta,
        **common,
    )


def refuse_unserved(config: ObjectiveConfig, codec: Codec, where: str) -> None:
    """Refuse targets at `where` that can't give what the objective needs; nothing is approximated in silence.

    Raises:
        ValueError: a divergence of the whole distribution, another temperature than the targets were made at, or
            terms, which see the teacher at temperature 1, on targets of another.
    """
    if codec.is_exact:
        return
    kind = soft_kind({name: weight for name, weight in config.weights.items() if name in FUSED})
    if kind not in (None, FROM_FEW_CLASSES):
        raise ValueError(
            f"objective.weights names {kind}, which needs the teacher's whole distribution; the targets in {where} are cut "
            f"({codec}) and serve of the fused ones {FROM_FEW_CLASSES} and {HARD}: use these, or score with --codec hidden"
        )
    terms = [name for name in config.weights if name not in FUSED]
    if terms and codec.temperature != 1:
        raise ValueError(
            f"objective.weights names {', '.join(terms)}, for which the teacher speaks at temperature 1; the targets in {where} "
            f"were made at {codec.temperature}: score at 1, or with --codec hidden"
        )
    for key in ("temperature", "confidence_temperature") if "rld" in terms else ():
        if (value := config.settings.get("rld", {}).get(key, 1)) != 1:
            raise ValueError(
                f"objective.settings.rld.{key} is {value}, but the targets in {where} are cut ({codec}): the rest of the "
                "vocabulary has no probability at another temperature than 1: set it to 1, or score with --codec hidden"
            )
    ramp = config.temperature
    values = {value for _, value in ramp} if isinstance(ramp, list) else {ramp}
    if values != {codec.temperature}:
        raise ValueError(
            f"objective.temperature is {ramp}, the targets in {where} were made at {codec.temperature}: use that, or score "
            "again (--codec hidden serves every temperature)"
        )


def soft_kind(weights: Mapping[str, Any]) -> str | None:
    """The divergence from the teacher that `weights` names; None for hard labels alone.

    Raises:
        ValueError: several, which one pass can not serve.
    """
    kinds = [name for name in weights if name != HARD]
    if len(kinds) > 1:
        raise ValueError(f"one divergence from the teacher at a time, got {' and '.join(kinds)}: keep one")
    return kinds[0] if kinds else None
