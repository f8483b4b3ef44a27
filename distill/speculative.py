"""Speculative distillation: the student goes on with a text, the teacher replaces what it holds for poor.

SKD (2410.11325, ICLR 2025), for a later stage of training with a live teacher: the student meets its own mistakes, yet
no text that the teacher would find absurd. A causal model's question becomes its own continuation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from distill.data import Batch
from distill.models import head_of


@torch.no_grad()
def continued(
    batch: Batch, student: PreTrainedModel, teacher: PreTrainedModel, kept: int, vocab_size: int, pad_id: int
) -> Batch:
    """The batch with the second half of each sequence proposed by the student, token by token.

    A token that is not among the teacher's `kept` likeliest after the same words is replaced by one that the teacher
    draws; both draw at temperature 1, never padding. Rows that count are those that predict the new tokens, labels
    the tokens themselves: what a divergence from the teacher is taken on. kept = vocab_size keeps all that the student
    says. Both speak in evaluation mode: no dropout, and caches, which activation checkpointing drops in training.
    A micro-batch with an attention mask (one with padding) stays as it is. Costs L / 2 short forward passes of
    both models, with caches.
    """
    ids_BL, mask, _ = batch.inputs
    if mask is not None:
        return batch
    ids_BL, length = ids_BL.clone(), ids_BL.shape[1]
    start = length // 2
    models = [_Speaker(student, vocab_size, pad_id), _Speaker(teacher, vocab_size, pad_id)]
    with in_evaluation(student), in_evaluation(teacher):
        for position in range(start, length):
            fresh_BT = ids_BL[:, :start] if position == start else ids_BL[:, position - 1 : position]
            own_BV, other_BV = (speaker.say(fresh_BT) for speaker in models)
            proposed_B1 = own_BV.softmax(1).multinomial(1)
            better_B1 = other_BV.softmax(1).multinomial(1)
            is_fine_B1 = (other_BV.topk(kept, dim=1).indices == proposed_B1).any(1, keepdim=True)
            ids_BL[:, position : position + 1] = torch.where(is_fine_B1, proposed_B1, better_B1)
    rows_BT = torch.arange(len(ids_BL), device=ids_BL.device)[:, None] * length + torch.arange(
        start - 1, length - 1, device=ids_BL.device
    )
    return replace(
        batch,
        inputs=batch.inputs._replace(input_ids_BL=ids_BL),
        rows_N=rows_BT.flatten(),
        labels_N=ids_BL[:, start:].flatten(),
    )


@contextmanager
def in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Speaker:
    """A causal model that is told words and says what may follow."""

    def __init__(self, model: PreTrainedModel, vocab_size: int, pad_id: int) -> None:
        self.model, self.vocab_size, self.pad_id = model, vocab_size, pad_id
        self.cache = DynamicCache(config=model.config)

    def say(self, fresh_BT: Tensor) -> Tensor:
        """Logits [B, V] of the word after `fresh_BT`, which come after all told before; float32, padding at -inf."""
        output = self.model.base_model(input_ids=fresh_BT, past_key_values=self.cache, use_cache=True)
        logits_BV = head_of(self.model)(output.last_hidden_state[:, -1])[:, : self.vocab_size].float()
        logits_BV[:, self.pad_id] = -torch.inf
        return logits_BV
