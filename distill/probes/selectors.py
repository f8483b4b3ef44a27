"""Which single checkpoint teaches best: the one that knows most about input and label, or the one that is easiest to follow.

Two answers to one question, from figures of each checkpoint on the same validation rows. Suffixes: N rows, V vocabulary,
D width of the teacher, S width of the student, C classes of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.data import Samples, validation_batches
from distill.models import counted_rows

OFFSETS = (
    -1,
    -2,
)  # places to the left of a row whose tokens are read back: visible to masked and causal models
CLASSES = 256  # the most frequent tokens; all others are one class more
ROWS = 2048  # at most; the kernel of the complexity is ROWS x ROWS
RIDGE = 1e-3  # of the kernel's mean diagonal
PENALTIES = (1.0, 0.1, 0.01)  # on the decoder's squared weights, over the number of rows; the best one counts


@dataclass(frozen=True)
class Asked:
    """What is the same for all checkpoints: the rows, and how the student sees them before it has learnt anything."""

    samples: Samples
    limit: int
    micro: int
    ranks_V: Tensor  # int64: frequency rank of each token, 0 for the most frequent
    inverse_NN: Tensor  # of the student's kernel
    student_p_NV: Tensor


def ask(samples: Samples, student: PreTrainedModel, ranks: np.ndarray, limit: int, micro: int) -> Asked:
    """The student's side, in float64. Its kernel is that of the gradients of its last layer, mean diagonal 1."""
    hidden_NS, _, log_p_NV = _rows(student, samples, limit, micro)
    kernel_NN = hidden_NS @ hidden_NS.T + 1.0  # the bias' gradient is 1
    kernel_NN /= kernel_NN.diagonal().mean()
    eye_NN = torch.eye(len(kernel_NN), dtype=torch.float64)
    inverse_NN = torch.linalg.inv(kernel_NN + RIDGE * eye_NN)
    return Asked(samples, limit, micro, torch.from_numpy(ranks), inverse_NN, log_p_NV.exp())


def select_figures(model: PreTrainedModel, asked: Asked) -> dict[str, float]:
    """information_input, information_label (nats), complexity of one checkpoint."""
    hidden_ND, read_NO, log_p_NV = _rows(model, asked.samples, asked.limit, asked.micro)
    labels_N = read_NO[:, -1]
    frequency = torch.bincount(labels_N, minlength=log_p_NV.shape[1]).double() / len(labels_N)
    entropy = -(frequency * frequency.clamp(min=1e-300).log()).sum()
    loss = -log_p_NV.gather(1, labels_N[:, None]).mean()
    about = [information_about(hidden_ND, asked.ranks_V[read_NO[:, o]]) for o in range(len(OFFSETS))]
    return {
        "information_input": sum(about) / len(about),
        "information_label": float((entropy - loss).clamp(min=0.0)),
        "complexity": complexity(log_p_NV.exp() - asked.student_p_NV, asked.inverse_NN),
    }


def complexity(residual_NV: Tensor, inverse_NN: Tensor) -> float:
    """sqrt( sum_v r_v^T K^-1 r_v / N ), r what the teacher says beyond the untrained student, K the student's kernel.

    Source: supervision complexity, Harutyunyan et al., ICLR 2023 (2301.12245), section 3; recalled, with the kernel of
    the last layer for that of all layers.
    """
    return float(((inverse_NN @ residual_NV) * residual_NV).sum().div(len(residual_NV)).sqrt())


def information_about(hidden_ND: Tensor, ranks_N: Tensor) -> float:
    """Nats that hidden states tell of a token, at least: its entropy minus the loss of a linear decoder on held-out rows.

    Rows with even numbers fit the decoder (softmax regression, L-BFGS), those with odd ones judge it. Source: Wang et
    al., Efficient KD from model checkpoints, NeurIPS 2022 (2210.06458), section 4: I(X; F) by reconstruction; the
    decoder is recalled.
    """
    classes_N = ranks_N.clamp(max=CLASSES)
    features_ND = (hidden_ND - hidden_ND.mean(0)) / hidden_ND.std(0).clamp(min=1e-6)
    fit, judge = slice(0, None, 2), slice(1, None, 2)
    share_C = torch.bincount(classes_N, minlength=CLASSES + 1).double() / len(classes_N)
    prior_C = share_C.clamp(min=1e-12).log()
    weight_DC = torch.zeros(hidden_ND.shape[1], CLASSES + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight_DC], max_iter=50, line_search_fn="strong_wolfe")

    def loss_of(rows: slice) -> Tensor:
        logits_NC = features_ND[rows] @ weight_DC + prior_C
        return torch.nn.functional.cross_entropy(logits_NC, classes_N[rows])

    def closure(penalty: float) -> Tensor:
        solver.zero_grad()
        loss = loss_of(fit) + penalty * weight_DC.square().sum() / len(classes_N)
        loss.backward()
        return loss

    known = []
    for penalty in PENALTIES:
        solver.step(partial(closure, penalty))
        known.append(float(loss_of(judge).detach()))
    with torch.no_grad():
        without = torch.nn.functional.cross_entropy(
            prior_C.expand(len(classes_N[judge]), -1), classes_N[judge]
        )
    return max(0.0, float(without) - min(known))


def picks(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Selector -> (teacher step, why): most information in sum; least of error and complexity in sum.

    The second is the bound of Harutyunyan et al. (theorem 1, recalled) with its constants left out.
    """
    knows = max(rows, key=lambda row: row["information_input"] + row["information_label"])
    easy = min(rows, key=lambda row: 1 - row["accuracy"] + row["complexity"])
    return {
        "information": (
            knows["step"],
            f"tells {knows['information_input']:.3f} nats of a token read and {knows['information_label']:.3f} of the label",
        ),
        "complexity": (
            easy["step"],
            f"error {1 - easy['accuracy']:.3f} and complexity {easy['complexity']:.3f} are least in sum",
        ),
    }


@torch.no_grad()
def _rows(model: PreTrainedModel, samples: Samples, limit: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden_ND, read_NO, log_p_NV), float64 and int64: tokens read at OFFSETS, then the label; rows from place 2 on."""
    hidden, read, log_p = [], [], []
    for batch in validation_batches(samples, limit, micro, 0, 1):
        length = batch.inputs.input_ids_BL.shape[1]
        inside_N = batch.rows_N % length >= -min(OFFSETS)
        rows_N, labels_N = batch.rows_N[inside_N], batch.labels_N[inside_N]
        tokens = batch.inputs.input_ids_BL.flatten()
        read.append(torch.stack([*(tokens[rows_N + o] for o in OFFSETS), labels_N], 1))
        moved = batch.to(model.device)
        rows = counted_rows(model, moved.inputs, rows_N.to(model.device))
        logits_NV = rows.head(rows.hidden_ND)[:, : samples.tokenizer.vocab_size]
        hidden.append(rows.hidden_ND.double().cpu())
        log_p.append(logits_NV.double().log_softmax(1).cpu())
        if sum(map(len, read)) >= ROWS:
            break
    return torch.cat(hidden)[:ROWS], torch.cat(read)[:ROWS], torch.cat(log_p)[:ROWS]
