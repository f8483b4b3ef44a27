"""Does a checkpoint know the grammar? A probe of its last hidden states for the non-terminals above each word.

Allen-Zhu & Li 2023, section 4, as Panigrahi et al. (ICLR 2025) use it: the frozen model's hidden states go
through heads that mix positions without looking at content, then a linear layer names the ancestor on every level.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data_prep.spans import SpanReader, ancestors_of, heights_of
from distill.config import Config, OptimConfig
from distill.data import Samples, attention, special_ids
from distill.files import write_text
from distill.models import Inputs, counted_rows, quiet_transformers
from distill.probes.trajectory import checkpoints
from distill.schedule import learning_rate
from distill.trajectory.manifest import load_manifest

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
    """Hidden states [S, L, D], words [S, L] bool, ancestors [S, L, levels] in 0..2, heights [S, L]."""

    hidden: Tensor
    is_word: Tensor
    ancestors: Tensor
    heights: Tensor


@torch.no_grad()
def read_sentences(model: PreTrainedModel, samples: Samples, number: int, batch: int) -> Sentences:
    """The model's last hidden states, no word masked, of `number` sentences spread over the split."""
    spans = SpanReader(samples.config.shards, samples.reader.split)
    ids = np.arange(min(number, len(samples))) * len(samples) // min(number, len(samples))
    tokens = np.stack([samples.reader[int(i)] for i in ids]).astype(np.int64)
    codes = np.stack([spans[int(i)] for i in ids])
    hidden = [_hidden(model, samples, tokens[first : first + batch]) for first in range(0, len(ids), batch)]
    heights = torch.from_numpy(heights_of(codes).astype(np.int64))
    ancestors = torch.from_numpy(ancestors_of(codes, spans.levels).astype(np.int64))
    is_word = torch.from_numpy(~np.isin(tokens, special_ids(samples.tokenizer)))
    return Sentences(torch.cat(hidden), is_word, ancestors, heights)


def _hidden(model: PreTrainedModel, samples: Samples, tokens_BL: np.ndarray) -> Tensor:
    config, device = samples.config, model.device
    mask, positions = attention(tokens_BL, samples.tokenizer, config.task == "clm", config.isolate_documents)
    mask, positions = (None if t is None else t.to(device) for t in (mask, positions))
    inputs = Inputs(torch.from_numpy(tokens_BL).to(device), mask, positions)
    rows = counted_rows(model, inputs, torch.arange(tokens_BL.size, device=device))
    return rows.hidden_ND.unflatten(0, tokens_BL.shape).cpu()


def fit(train: Sentences, study: NonterminalStudy) -> Probe:
    """A probe trained on the sentences, the same for the same seed."""
    _, length, width = train.hidden.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)
        probe = Probe(length, width, train.ancestors.shape[2])
        orders = [torch.randperm(len(train.hidden)).split(study.batch) for _ in range(study.epochs)]
    batches = [ids for order in orders for ids in order]
    optimizer = torch.optim.Adam(probe.parameters(), lr=study.lr)
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OptimConfig(lr=study.lr), step, len(batches))
        logits = probe(train.hidden[ids], train.is_word[ids])[train.is_word[ids]]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), train.ancestors[ids][train.is_word[ids]].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe.eval()


@torch.no_grad()
def accuracies(probe: Probe, held_out: Sentences, batch: int) -> dict[str, list[float]]:
    """Per level from 1 up: `words`, share of the words whose ancestor is named right; `ends`, of those that end its span."""
    guesses = [
        probe(held_out.hidden[s : s + batch], held_out.is_word[s : s + batch]).argmax(dim=-1)
        for s in range(0, len(held_out.hidden), batch)
    ]
    right = torch.cat(guesses) == held_out.ancestors
    levels = range(right.shape[2])
    ends = [held_out.heights > level for level in levels]
    return {
        "words": [float(right[..., level][held_out.is_word].double().mean()) for level in levels],
        "ends": [float(right[..., level][ends[level]].double().mean()) for level in levels],
    }


def majority(held_out: Sentences) -> list[float]:
    """Per level: accuracy of always naming the commonest symbol."""
    counts = [
        torch.bincount(held_out.ancestors[..., k][held_out.is_word])
        for k in range(held_out.ancestors.shape[2])
    ]
    return [float(c.max() / c.sum()) for c in counts]


def probe_nonterminals(
    trajectory: Path, config: Config, steps: list[int], out: Path, study: NonterminalStudy
) -> dict[str, Any]:
    """Accuracies of a fresh probe on every checkpoint of `steps`, kept in `out` (JSON) as they come."""
    quiet_transformers()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"checkpoints": {}}
    manifest = load_manifest(trajectory)
    splits = {s: Samples(config.data, s, 0, shuffle=False) for s in ("train", "validation")}
    todo = [step for step in steps if str(step) not in found["checkpoints"]]
    for step, model in checkpoints(manifest, config, splits["train"].sequence_length, todo):
        probe = fit(read_sentences(model, splits["train"], study.train, study.batch), study)
        held_out = read_sentences(model, splits["validation"], study.validation, study.batch)
        found["checkpoints"][str(step)] = accuracies(probe, held_out, study.batch)
        found["majority"] = majority(held_out)
        write_text(out, json.dumps(found, indent=1))
    return found
