"""Input that would give a silent wrong number is refused, naming the argument, the value and the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.kernels import SparseTargets, divergence, sparse_divergence

LOGITS, LABELS = torch.zeros(2, 5), torch.tensor([0, 4])
BAD_INPUT: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((torch.zeros(2, 5, 1), LOGITS, None), {}, r"\[N, V\]"),
    ((LOGITS.long(), LOGITS, None), {}, "floating"),
    ((LOGITS, torch.zeros(3, 5), None), {}, "2 rows, teacher 3"),
    ((LOGITS, torch.zeros(2, 6), None), {}, "5 columns, teacher 6"),
    ((LOGITS, LOGITS, None), {"vocab_size": 6}, r"1\.\.5.*got 6"),
    ((LOGITS, LOGITS, torch.tensor([0, 5])), {}, r"label 5 in row 1"),
    ((LOGITS, LOGITS, torch.tensor([-1, 0])), {}, r"label -1 in row 0"),
    ((LOGITS, LOGITS, torch.tensor([0, 4])), {"vocab_size": 4}, r"label 4 in row 1"),
    ((LOGITS, LOGITS, torch.tensor([0])), {}, r"int64 \[2\], got torch.int64 \(1,\)"),
    ((LOGITS, LOGITS, LABELS.float()), {}, "int64"),
    ((LOGITS, None, LABELS), {}, "no teacher"),
    ((LOGITS, LOGITS, None), {"hard_weight": 0.1}, "no labels"),
    ((LOGITS, LOGITS, None), {"temperature": -1.0}, "temperature.*-1"),
    ((LOGITS, LOGITS, None), {"temperature": float("nan")}, "temperature.*nan"),
    ((LOGITS, LOGITS, None), {"temperature_on": "student"}, "'student'"),
    ((LOGITS, LOGITS, None), {"impl": "cuda"}, "'cuda'"),
    ((LOGITS, LOGITS, None), {"kind": "forwardkl"}, "did you mean 'forward_kl'"),
    ((LOGITS, LOGITS, None), {"kind": "jsd", "beta": 1.5}, r"0\.\.1, got 1\.5"),
    ((LOGITS, LOGITS, None), {"kind": "jsd", "beta": float("nan")}, "beta.*nan"),
    ((LOGITS, LOGITS, None), {"soft_weight": float("inf")}, "soft_weight.*inf"),
    ((LOGITS, LOGITS, None), {"vocab_size": True}, "vocab_size must be a whole number of columns, got True"),
    ((LOGITS, LOGITS, None), {"vocab_size": 5.0}, "vocab_size must be a whole number of columns, got 5.0"),
    ((LOGITS, LOGITS, None), {"kind": "reverse_kl", "temperature": 0.0}, "reverse KL is infinite"),
    ((LOGITS, LOGITS, None, torch.ones(3)), {}, r"weights_N must be float32 \[2\], got torch.float32 \(3,\)"),
    ((LOGITS, LOGITS, None, torch.ones(2).double()), {}, "float64"),
    ((LOGITS.double(), LOGITS, None), {"impl": "cpu"}, "can not serve"),
    ((LOGITS.to("meta"), LOGITS.to("meta"), None), {"impl": "cpu"}, "can not serve"),
    ((LOGITS.to("meta"), LOGITS, None), {}, "teacher on cpu"),
]


@pytest.mark.parametrize("tensors, settings, message", BAD_INPUT, ids=[case[2] for case in BAD_INPUT])
def test_input_that_does_not_fit_is_refused(tensors: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divergence(*tensors, **settings)


IDS, PROBS = torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5)
BAD_TARGETS: list[tuple[SparseTargets, str]] = [
    (SparseTargets(IDS.int(), PROBS), r"ids_NK must be int64 \[2, K\], got torch.int32"),
    (SparseTargets(IDS[:1], PROBS), r"ids_NK must be int64 \[2, K\]"),
    (SparseTargets(IDS.repeat(1, 3), PROBS), r"K = 6 classes, must be 1\.\.5"),
    (SparseTargets(IDS, PROBS.double()), r"probs_NK must be float32 \[2, 2\]"),
    (SparseTargets(IDS, PROBS, torch.ones(3)), r"tail_N must be float32 \[2\]"),
    (SparseTargets(IDS + 2, PROBS), "target id 5 in row 1"),
    (SparseTargets(IDS, PROBS, None, torch.ones(2)), "no labels"),
    (SparseTargets(torch.tensor([[0, 1], [3, 3]]), PROBS), "target id 3 stands twice in row 1"),
    (SparseTargets(IDS, PROBS, torch.tensor([0.0, 0.2])), "targets of row 1 must be .* got a sum of 1.2000"),
    (SparseTargets(IDS, torch.tensor([[0.5, 0.5], [1.2, -0.2]])), "row 1 .* a smallest of -0.2"),
]


@pytest.mark.parametrize("targets, message", BAD_TARGETS, ids=[case[1] for case in BAD_TARGETS])
def test_targets_that_do_not_fit_are_refused(targets: SparseTargets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_divergence(LOGITS, targets)


def test_gold_probability_that_was_not_in_the_tail_is_refused() -> None:
    targets = SparseTargets(IDS, 0.9 * PROBS, torch.full((2,), 0.1), torch.tensor([0.05, 0.7]))
    with pytest.raises(ValueError, match=r"gold_N of row 1 is 0.7, more than the tail_N of 0.1"):
        sparse_divergence(LOGITS, targets, torch.tensor([4, 4]))
