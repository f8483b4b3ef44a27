"""What is refused before any implementation sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.kernels.terms import IGNORED_LABEL, Terms


def real_vocabulary(student_NV: Tensor, teacher_NV: Tensor | None, vocab_size: int | None) -> int:
    """Number of columns that are no padding. Raises ValueError if the logits do not agree about it."""
    for name, logits in (("student", student_NV), ("teacher", teacher_NV)):
        if logits is not None and (logits.dim() != 2 or not logits.is_floating_point()):
            found = f"{logits.dtype} {tuple(logits.shape)}"
            raise ValueError(f"{name} logits must be a floating tensor [N, V], got {found}")
    widths = [logits.shape[1] for logits in (student_NV, teacher_NV) if logits is not None]
    if vocab_size is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"student has {widths[0]} columns, teacher {widths[1]}: "
                "give vocab_size if those beyond it are padding"
            )
        vocab_size = widths[0]
    if not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size must be in 1..{min(widths)} (columns of the logits), got {vocab_size}")
    return vocab_size


def check_tensors(
    student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor | None, terms: Terms
) -> None:
    """Raises ValueError for rows, labels or weights that do not fit together."""
    num_rows = student_NV.shape[0]
    if teacher_NV is None and terms.kl_weight:
        raise ValueError(f"kl_weight is {terms.kl_weight} but there are no teacher logits: set it to 0")
    if teacher_NV is not None and teacher_NV.shape[0] != num_rows:
        raise ValueError(f"student has {num_rows} rows, teacher {teacher_NV.shape[0]}: they must be the same")
    if teacher_NV is not None and teacher_NV.device != student_NV.device:
        raise ValueError(f"student is on {student_NV.device}, teacher on {teacher_NV.device}: move one")
    if labels_N is not None:
        _check_labels(labels_N, num_rows, terms.vocab_size)
    elif terms.hard_weight:
        raise ValueError(f"hard_weight is {terms.hard_weight} but there are no labels: set it to 0")


def _check_labels(labels_N: Tensor, num_rows: int, vocab_size: int) -> None:
    if labels_N.shape != (num_rows,) or labels_N.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{num_rows}], got {labels_N.dtype} {tuple(labels_N.shape)}")
    if labels_N.device.type != "cpu" or torch.compiler.is_compiling():
        return  # would wait for the device, or break the graph; the implementations check again
    wrong_N = (labels_N != IGNORED_LABEL) & ((labels_N < 0) | (labels_N >= vocab_size))
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        found = int(labels_N[row])
        raise ValueError(f"label {found} in row {row} is neither {IGNORED_LABEL} nor in 0..{vocab_size - 1}")
