"""Speculative distillation: the student goes on with a text, the teacher replaces what it holds for poor.

SKD (2410.11325, ICLR 2025), for a later stage of training with a live teacher: the student meets its own mistakes, yet
no text that the teacher would find absurd. A causal model's question becomes its own continuation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from distill.data import Batch
from distill.head import Head
from distill.models import Rows, counted_rows, head_of
from distill.objectives.seen import label_log_probabilities

CHUNK_ROWS = 512  # rows whose logits are alive at once


@torch.no_grad()
def continued(
    batch: Batch,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    kept: int,
    vocab_size: int,
    pad_id: int,
) -> Batch:
    """The batch with the second half of each sequence proposed by the student, token by token.

    A token that is not among the teacher's `kept` likeliest after the same words is replaced by one that the teacher
    draws; both draw at temperature 1, never padding. Rows that count are those that predict the new tokens, labels
    the tokens themselves: what a divergence from the teacher is taken on. Without a teacher all stays that the student
    says. Both speak in evaluation mode: no dropout, and caches, which activation checkpointing drops in training.
    A micro-batch with an attention mask (one with padding) stays as it is. Costs L / 2 short forward passes of
    both models, with caches.
    """
    ids_BL, mask, _ = batch.inputs
    if mask is not None:
        return batch
    ids_BL, length = ids_BL.clone(), ids_BL.shape[1]
    start = length // 2
    speaker = _Speaker(student, vocab_size, pad_id)
    checker = _Speaker(teacher, vocab_size, pad_id) if teacher else None
    with in_evaluation(student), in_evaluation(teacher) if teacher else nullcontext():
        for position in range(start, length):
            fresh_BT = ids_BL[:, :start] if position == start else ids_BL[:, position - 1 : position]
            said_B1 = speaker.say(fresh_BT).softmax(1).multinomial(1)
            if checker:
                other_BV = checker.say(fresh_BT)
                better_B1 = other_BV.softmax(1).multinomial(1)
                is_fine_B1 = (other_BV.topk(kept, dim=1).indices == said_B1).any(1, keepdim=True)
                said_B1 = torch.where(is_fine_B1, said_B1, better_B1)
            ids_BL[:, position : position + 1] = said_B1
    rows_BT = torch.arange(len(ids_BL), device=ids_BL.device)[:, None] * length + torch.arange(
        start - 1, length - 1, device=ids_BL.device
    )
    return replace(
        batch,
        inputs=batch.inputs._replace(input_ids_BL=ids_BL),
        rows_N=rows_BT.flatten(),
        labels_N=ids_BL[:, start:].flatten(),
    )


@torch.no_grad()
def corrected_pairs(
    batch: Batch,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    reference: PreTrainedModel,
    kept: int,
    vocab_size: int,
    pad_id: int,
) -> Batch:
    """Twice as many sequences: the student's continuations as the teacher corrects them, then as the student said them.

    The warm-up of Warmup-Distill (2502.11766): the teacher reads what the student has said in one pass, and each token
    that is not among its `kept` likeliest there becomes its likeliest; the words after it stay. Rows and labels as in
    `continued`; reference_N is what `reference` says of these labels.
    """
    own = continued(batch, student, None, kept, vocab_size, pad_id)
    if own is batch:
        return batch
    with in_evaluation(teacher):
        judge = counted_rows(teacher, own.inputs, own.rows_N)
    ids_BL = own.inputs.input_ids_BL
    better_BL, length = ids_BL.clone(), ids_BL.shape[1]
    better_BL[:, length // 2 :] = _corrected(judge, own.labels_N, kept, vocab_size, pad_id).view(
        len(ids_BL), -1
    )
    inputs = own.inputs._replace(input_ids_BL=torch.cat([better_BL, ids_BL]))
    rows_N = torch.cat([own.rows_N, own.rows_N + ids_BL.numel()])
    labels_N = torch.cat([better_BL, ids_BL])[:, length // 2 :].flatten()
    told_N = label_log_probabilities(counted_rows(reference, inputs, rows_N), labels_N, vocab_size)
    return replace(batch, inputs=inputs, rows_N=rows_N, labels_N=labels_N, reference_N=told_N)


def _corrected(judge: Rows, labels_N: Tensor, kept: int, vocab_size: int, pad_id: int) -> Tensor:
    """[N]: each label that is among the judge's `kept` likeliest, else its likeliest, which is never padding."""
    found = []
    for hidden_CD, labels_C in zip(
        judge.hidden_ND.split(CHUNK_ROWS), labels_N.split(CHUNK_ROWS), strict=True
    ):
        logits_CV = _sayable(judge.head, hidden_CD, vocab_size, pad_id)
        top_Ck = logits_CV.topk(kept, dim=1).indices
        is_fine_C = (top_Ck == labels_C[:, None]).any(1)
        found.append(torch.where(is_fine_C, labels_C, top_Ck[:, 0]))
    return torch.cat(found)


def _sayable(head: Head, hidden_ND: Tensor, vocab_size: int, pad_id: int) -> Tensor:
    """Logits [N, V] in float32, padding at -inf."""
    logits_NV = head(hidden_ND)[:, :vocab_size].float()
    logits_NV[:, pad_id] = -torch.inf
    return logits_NV


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
        """`_sayable` [B, V] of the word after `fresh_BT`, which come after all told before."""
        output = self.model.base_model(input_ids=fresh_BT, past_key_values=self.cache, use_cache=True)
        return _sayable(head_of(self.model), output.last_hidden_state[:, -1], self.vocab_size, self.pad_id)
