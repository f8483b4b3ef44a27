"""Does a checkpoint know the grammar? A probe of its last hidden states for the non-terminals above each word.

Allen-Zhu & Li 2023, section 4, as Panigrahi et al. (ICLR 2025) use it: the frozen model's hidden states go
through heads that mix positions without looking at content, then a linear layer names the ancestor on every level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_prep.spans import SpanReader, ancestors_of, heights_of
from distill.config import DataConfig, OptimConfig
from distill.data import Samples, attention, special_ids
from distill.models import Inputs, counted_rows
from distill.schedule import learning_rate

SYMBOLS = 3  # on every level
_HEADS, _POSITION_WIDTH = 16, 16


@dataclass(frozen=True)
class NonterminalStudy:
    """How the probe is trained: the paper's settings but for the number of sentences."""

    train: int = 2048  # sentences
    validation: int = 1024
    epochs: int = 4
    batch: int = 64
    lr: float = 1e-2
    seed: int = 0


class Probe(nn.Module):
    """hidden_BLD -> logits [B, L, levels, 3]: each head averages all words by their positions alone."""

    def __init__(self, length: int, width: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.positions = nn.Parameter(torch.randn(_HEADS, length, _POSITION_WIDTH))
        self.out = nn.Linear(_HEADS * width, levels * SYMBOLS)

    def forward(self, hidden_BLD: Tensor, is_word_BL: Tensor) -> Tensor:
        scores = self.positions @ self.positions.transpose(1, 2) / math.sqrt(_POSITION_WIDTH)
        scores = scores[None].masked_fill(~is_word_BL[:, None, None, :], -math.inf)  # B, heads, L, L
        mixed = torch.einsum("bhij,bjd->bihd", scores.softmax(dim=-1), hidden_BLD)
        return self.out(mixed.flatten(2)).unflatten(2, (self.levels, SYMBOLS))


@dataclass(frozen=True)
class Sentences:
    """Tokens [S, L] int64, words [S, L] bool, ancestors [S, L, levels] in 0..2, heights [S, L]."""

    tokens: np.ndarray
    is_word: Tensor
    ancestors: Tensor
    heights: Tensor


@dataclass(frozen=True)
class NonterminalQuestion:
    """What is the same for all checkpoints."""

    study: NonterminalStudy
    samples: Samples  # of either split: they say how a model reads the sentences
    train: Sentences
    held_out: Sentences


def ask_nonterminals(data: DataConfig, study: NonterminalStudy) -> NonterminalQuestion:
    """Sentences spread over both splits, with their labels.

    Raises:
        ValueError: the shards come without parse spans.
    """
    train, validation = (Samples(data, split, 0, shuffle=False) for split in ("train", "validation"))
    try:
        sentences = read_sentences(train, study.train), read_sentences(validation, study.validation)
    except ValueError as error:
        raise ValueError(f"--nonterminals: {error}") from error
    return NonterminalQuestion(study, train, *sentences)


def nonterminal_figures(model: PreTrainedModel, asked: NonterminalQuestion) -> dict[str, list[float]]:
    """`accuracies` of a fresh probe of this model, trained and judged on the model's device."""
    study, samples = asked.study, asked.samples
    probe = fit(hidden_states(model, samples, asked.train, study.batch), asked.train, study, model.device)
    hidden_SLD = hidden_states(model, samples, asked.held_out, study.batch)
    return accuracies(probe, hidden_SLD, asked.held_out, study.batch)


def read_sentences(samples: Samples, number: int) -> Sentences:
    """`number` sentences spread over the split. Raises ValueError if there are no spans beside its shards."""
    spans = SpanReader(samples.config.shards, samples.reader.split)
    ids = np.arange(min(number, len(samples))) * len(samples) // min(number, len(samples))
    tokens = np.stack([samples.reader[int(i)] for i in ids]).astype(np.int64)
    codes = np.stack([spans[int(i)] for i in ids])
    heights = torch.from_numpy(heights_of(codes).astype(np.int64))
    ancestors = torch.from_numpy(ancestors_of(codes, spans.levels).astype(np.int64))
    is_word = torch.from_numpy(~np.isin(tokens, special_ids(samples.tokenizer)))
    return Sentences(tokens, is_word, ancestors, heights)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, samples: Samples, sentences: Sentences, batch: int) -> Tensor:
    """The model's last hidden states [S, L, D], no word masked, on the CPU."""
    tokens = sentences.tokens
    parts = [_hidden(model, samples, tokens[first : first + batch]) for first in range(0, len(tokens), batch)]
    return torch.cat(parts)


def _hidden(model: PreTrainedModel, samples: Samples, tokens_BL: np.ndarray) -> Tensor:
    config, device = samples.config, model.device
    mask, positions = attention(tokens_BL, samples.tokenizer, config.task == "clm", config.isolate_documents)
    mask, positions = (None if t is None else t.to(device) for t in (mask, positions))
    inputs = Inputs(torch.from_numpy(tokens_BL).to(device), mask, positions)
    rows = counted_rows(model, inputs, torch.arange(tokens_BL.size, device=device))
    return rows.hidden_ND.unflatten(0, tokens_BL.shape).cpu()


def fit(hidden_SLD: Tensor, train: Sentences, study: NonterminalStudy, device: torch.device) -> Probe:
    """A probe on `device`, trained on the sentences; the same for the same seed."""
    _, length, width = hidden_SLD.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        probe = Probe(length, width, train.ancestors.shape[2]).to(device)
        orders = [torch.randperm(len(hidden_SLD)).split(study.batch) for _ in range(study.epochs)]
    batches = [ids for order in orders for ids in order]
    optimizer = torch.optim.Adam(probe.parameters(), lr=study.lr)
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OptimConfig(lr=study.lr), step, len(batches))
        is_word = train.is_word[ids].to(device)
        logits = probe(hidden_SLD[ids].to(device), is_word)[is_word]
        labels = train.ancestors[ids].to(device)[is_word]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval()


@torch.no_grad()
def accuracies(probe: Probe, hidden_SLD: Tensor, held_out: Sentences, batch: int) -> dict[str, list[float]]:
    """Per level from 1 up: `words`, share of the words whose ancestor is named right; `ends`, of those that end its span."""
    device = probe.positions.device
    guesses = [
        probe(hidden.to(device), is_word.to(device)).argmax(dim=-1).cpu()
        for hidden, is_word in zip(hidden_SLD.split(batch), held_out.is_word.split(batch), strict=True)
    ]
    right = torch.cat(guesses) == held_out.ancestors
    levels = range(right.shape[2])
    ends = [held_out.heights > level for level in levels]
    return {
        "words": [float(right[..., level][held_out.is_word].double().mean()) for level in levels],
        "ends": [float(right[..., level][ends[level]].double().mean()) for level in levels],
    }


def majority(held_out: Sentences) -> list[float]:
    """Per level: accuracy of always naming the commonest symbol, at the ends of its spans."""
    counts = [
        torch.bincount(held_out.ancestors[..., k][held_out.heights > k])
        for k in range(held_out.ancestors.shape[2])
    ]
    return [float(c.max() / c.sum()) for c in counts]
