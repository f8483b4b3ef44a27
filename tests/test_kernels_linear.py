"""Heads and divergence in chunks of rows: the same numbers as in one go, without ever holding all logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.kernels import Divergence, divergence, linear_divergence

N, D, WIDE, V = 50, 6, 10, 33
SETTINGS: dict[str, Any] = {"kl_weight": 0.7, "hard_weight": 0.3, "temperature": 2.0}


class CountingHead(nn.Linear):
    """A head that remembers how often it ran and which of its logits are still alive."""

    def __init__(self, width: int) -> None:
        super().__init__(width, V)
        self.logits: list[weakref.ref[Tensor]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        logits = super().forward(hidden)
        self.logits.append(weakref.ref(logits))
        return logits

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.logits)


class Pair:
    def __init__(self, rows: int = N) -> None:
        torch.manual_seed(0)
        self.hidden, self.teacher_hidden = torch.randn(rows, D).requires_grad_(), torch.randn(rows, WIDE)
        self.head, self.teacher_head = CountingHead(D), CountingHead(WIDE)
        self.labels = torch.randint(0, V, (rows,))
        self.labels[::4] = -100

    def run(self, **keywords: Any) -> Divergence:
        return linear_divergence(
            self.hidden,
            self.head,
            self.teacher_hidden,
            self.teacher_head,
            self.labels,
            **{**SETTINGS, **keywords},
        )

    def grads(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head.weight, self.head.bias))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 25, 49, 50, 1024])
def test_chunks_give_the_same_sums_and_gradients_as_all_rows_at_once(impl: Any, chunk_rows: int) -> None:
    pair = Pair()
    with torch.no_grad():
        teacher_logits = pair.teacher_head(pair.teacher_hidden)
    whole = divergence(pair.head(pair.hidden), teacher_logits, pair.labels, impl=impl, **SETTINGS)
    expected = pair.grads(whole.loss)
    chunked = pair.run(chunk_rows=chunk_rows, impl=impl)
    for a, b in zip(chunked, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(pair.grads(chunked.loss), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not any(part.requires_grad for part in chunked[1:])
    assert pair.teacher_head.weight.grad is None


def test_logits_of_several_chunks_are_not_kept_but_computed_again() -> None:
    pair = Pair()
    loss = pair.run(chunk_rows=20).loss
    assert (len(pair.head.logits), pair.head.alive(), pair.teacher_head.alive()) == (3, 0, 0)
    loss.backward()
    assert (len(pair.head.logits), pair.head.alive()) == (6, 0)


def test_one_chunk_is_computed_once() -> None:
    pair = Pair()
    pair.run(chunk_rows=N).loss.backward()
    assert (len(pair.head.logits), len(pair.teacher_head.logits)) == (1, 1)


def test_no_rows_give_zero_and_zero_gradients() -> None:
    pair = Pair(rows=0)
    result = pair.run()
    assert [float(part.detach()) for part in result] == [0.0] * 6
    assert all(grad.count_nonzero() == 0 for grad in pair.grads(result.loss))


def test_without_a_teacher_only_labels_teach() -> None:
    pair = Pair()
    result = linear_divergence(
        pair.hidden, pair.head, None, None, pair.labels, chunk_rows=16, kl_weight=0.0, hard_weight=1.0
    )
    assert result.kl.item() == 0 and result.loss.item() == pytest.approx(result.hard.item())


def test_arguments_that_do_not_fit_are_refused() -> None:
    pair = Pair()
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        pair.run(chunk_rows=0)
    with pytest.raises(ValueError, match="given together"):
        linear_divergence(pair.hidden, pair.head, pair.teacher_hidden, None, pair.labels)
    with pytest.raises(ValueError, match=r"labels \(49,\) do not fit hidden \(50, 6\)"):
        linear_divergence(pair.hidden, pair.head, None, None, pair.labels[1:], kl_weight=0.0)
