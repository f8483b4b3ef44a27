"""What is refused before any implementation sees it."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.kernels.terms import IGNORED_LABEL, SparseTargets, Terms

ROUNDING = 1e-3  # of a sum of probabilities that were stored in few bits


def real_vocabulary(student_NV: Tensor, teacher_NV: Tensor | None, vocab_size: int | None) -> int:
    """Number of columns that are no padding. Raises ValueError if the logits do not agree about it."""
    for name, logits in (("student", student_NV), ("teacher", teacher_NV)):
        if logits is not None and (logits.dim() != 2 or not logits.is_floating_point()):
            found = f"{logits.dtype} {tuple(logits.shape)}"
            raise ValueError(f"{name} logits must be a floating tensor [N, V], got {found}")
    return agreed_vocabulary(
        student_NV.shape[1], None if teacher_NV is None else teacher_NV.shape[1], vocab_size
    )


def agreed_vocabulary(student_columns: int, teacher_columns: int | None, vocab_size: int | None) -> int:
    """Number of columns that are no padding on either side. Raises ValueError if that is not clear."""
    widths = [width for width in (student_columns, teacher_columns) if width is not None]
    if vocab_size is None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"student has {widths[0]} columns, teacher {widths[1]}: "
                "give vocab_size if those beyond it are padding"
            )
        vocab_size = widths[0]
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise ValueError(f"vocab_size must be a whole number of columns, got {vocab_size!r}")
    if not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size must be in 1..{min(widths)} (columns of the logits), got {vocab_size}")
    return vocab_size


def check_tensors(
    student_NV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_N: Tensor | None,
    weights_N: Tensor | None,
    terms: Terms,
) -> None:
    """Raises ValueError for rows, labels or weights that do not fit together.

    `student_NV` may be any tensor with the rows and the device of the logits.
    """
    if teacher is None and terms.soft_weight:
        raise ValueError(f"soft_weight is {terms.soft_weight} but there is no teacher: set it to 0")
    if labels_N is None and terms.hard_weight:
        raise ValueError(f"hard_weight is {terms.hard_weight} but there are no labels: set it to 0")
    num_rows, device = student_NV.shape[0], student_NV.device
    if isinstance(teacher, SparseTargets):
        _check_sparse(teacher, num_rows, device, terms)
    elif teacher is not None and teacher.shape[0] != num_rows:
        raise ValueError(f"student has {num_rows} rows, teacher {teacher.shape[0]}: they must be the same")
    named = {"labels_N": labels_N, "weights_N": weights_N}
    for name, tensor in {"teacher": teacher, **named}.items():
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"student is on {device}, {name} on {tensor.device}: move one")
    if labels_N is not None:
        _check_labels(labels_N, num_rows, terms.vocab_size)
    if weights_N is not None and (weights_N.shape != (num_rows,) or weights_N.dtype != torch.float32):
        found = f"{weights_N.dtype} {tuple(weights_N.shape)}"
        raise ValueError(f"weights_N must be float32 [{num_rows}], got {found}")


def _check_sparse(targets: SparseTargets, num_rows: int, device: torch.device, terms: Terms) -> None:
    if terms.kind != "forward_kl":
        raise ValueError(
            f"sparse targets serve forward_kl alone, got kind {terms.kind!r}: use the whole teacher"
        )
    ids_NK, probs_NK, *others = targets
    if ids_NK.dim() != 2 or ids_NK.shape[0] != num_rows or ids_NK.dtype != torch.int64:
        found = f"{ids_NK.dtype} {tuple(ids_NK.shape)}"
        raise ValueError(f"targets.ids_NK must be int64 [{num_rows}, K], got {found}")
    if not 1 <= ids_NK.shape[1] <= terms.vocab_size:
        raise ValueError(f"targets.ids_NK keeps K = {ids_NK.shape[1]} classes, must be 1..{terms.vocab_size}")
    shapes = {"probs_NK": ids_NK.shape, "tail_N": (num_rows,), "gold_N": (num_rows,)}
    for (name, shape), tensor in zip(shapes.items(), (probs_NK, *others), strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"targets.{name} must be float32 {list(shape)}, got {found}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"student is on {device}, targets.{name} on {tensor.device}: move one")
    if ids_NK.device != device:
        raise ValueError(f"student is on {device}, targets.ids_NK on {ids_NK.device}: move one")
    if ids_NK.device.type != "cpu" or torch.compiler.is_compiling():
        return
    _check_entries(targets, terms.vocab_size)


def _check_entries(targets: SparseTargets, vocab_size: int) -> None:
    """What would give a silent wrong number: entries that are no classes, come twice, or are no distribution."""
    ids_NK, probs_NK, tail_N, _ = targets
    is_entry_NK = probs_NK != 0
    if (wrong_NK := is_entry_NK & ((ids_NK < 0) | (ids_NK >= vocab_size))).any():
        row, entry = wrong_NK.nonzero()[0].tolist()
        raise ValueError(f"target id {int(ids_NK[row, entry])} in row {row} is not in 0..{vocab_size - 1}")
    sorted_NK = ids_NK.where(is_entry_NK, -1 - torch.arange(ids_NK.shape[1])).sort(1).values
    if (twice_NK := sorted_NK[:, 1:] == sorted_NK[:, :-1]).any():
        row, entry = twice_NK.nonzero()[0].tolist()
        raise ValueError(
            f"target id {int(sorted_NK[row, entry])} stands twice in row {row}: add its probabilities up"
        )
    mass_N = probs_NK.sum(1) if tail_N is None else probs_NK.sum(1) + tail_N
    least_N = probs_NK.amin(1) if tail_N is None else torch.minimum(probs_NK.amin(1), tail_N)
    if (wrong_N := (least_N < 0) | (mass_N > 1 + ROUNDING)).any():
        row = int(wrong_N.nonzero()[0])
        raise ValueError(
            f"targets of row {row} must be probabilities with a sum of at most 1, tail included, "
            f"got a sum of {float(mass_N[row]):.4f} and a smallest of {float(least_N[row]):.4g}"
        )


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
