"""Micro-batches: samples in an order that nothing but the seed decides, masked by (seed, epoch, sample).

The only state is the number of consumed samples: ranks, workers, micro-batches and resume change nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.shards import ShardReader, TokenizerInfo
from data_prep.spans import SpanReader, heights_of
from distill.config import DataConfig
from distill.kernels import IGNORED_LABEL as IGNORE
from distill.models import Inputs
from distill.retokenize import Retokenizer
from distill.sample_order import GOLDEN, Ints, keys_of, mix, sample_ids
from distill.targets.reader import TargetReader, Targets
from distill.targets.sparse import SparseTargets


class Retold(NamedTuple):
    """A micro-batch for a teacher with another tokenizer.

    rows_M: int64, into its flattened positions, of the tokens that end where one of the N counted rows does; matches_M:
    int64, which of these.
    """

    inputs: Inputs
    rows_M: Tensor
    matches_M: Tensor


@dataclass
class Batch:
    """One micro-batch.

    rows_N: int64 indices, into the flattened [B*L] positions, of the rows that count; labels_N: their labels.
    """

    inputs: Inputs
    rows_N: Tensor
    labels_N: Tensor
    num_tokens: int  # without padding
    sample_ids: Ints
    targets: Targets | None = None  # of the rows that count, where a teacher's were stored
    reference_N: Tensor | None = None  # see Inside of `models`
    retold: Retold | None = None  # where the teacher has another tokenizer

    def without_rows(self) -> Batch:
        """The same inputs, of which nothing counts."""
        none, told = slice(0), self.retold
        return replace(
            self,
            rows_N=self.rows_N[none],
            labels_N=self.labels_N[none],
            sample_ids=self.sample_ids[none],
            num_tokens=0,
            targets=None,
            retold=told and told._replace(rows_M=told.rows_M[none], matches_M=told.matches_M[none]),
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; from pinned memory the host does not wait for the copy."""
        return self if device.type == "cpu" else self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, in a thread of its own."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def each(parts: Iterable[Tensor | None]) -> Iterator[Any]:
            return (None if t is None else change(t) for t in parts)

        targets, retold = self.targets, self.retold
        return replace(
            self,
            inputs=Inputs(*each(self.inputs)),
            retold=Retold(Inputs(*each(retold.inputs)), *each(retold[1:])) if retold else None,
            rows_N=change(self.rows_N),
            labels_N=change(self.labels_N),
            targets=SparseTargets(*each(targets))
            if isinstance(targets, SparseTargets)
            else next(each([targets])),
        )


# ------------------------------------------------------------------------------------------------ questions


def mask_tokens(
    tokens_BL: Ints, epochs_B: Ints, ids_B: Ints, config: DataConfig, tokenizer: TokenizerInfo, seed: int
) -> tuple[Ints, Ints]:
    """(masked tokens_BL, labels_BL) for masked language modelling (Devlin et al. 2019, section 3.1).

    What happens to a position is a function of (seed, epoch, sample, position). Special tokens are never
    predicted. Of the predicted ones mask_token_share become <mask>, random_token_share a random other token.
    """
    keys_B = keys_of(seed, 3, epochs_B, ids_B)
    words = mix(
        keys_B[:, None, None] + np.arange(3 * tokens_BL.shape[1], dtype=np.uint64).reshape(3, -1) * GOLDEN
    )
    choose, replace, fresh = (words[:, i] for i in range(3))
    uniform = np.float64(2.0**-64)
    specials = special_ids(tokenizer)
    predicted = (choose * uniform < config.mask_rate) & ~np.isin(tokens_BL, specials)
    labels_BL = np.where(predicted, tokens_BL, IGNORE)
    how = replace * uniform
    masked = predicted & (how < config.mask_token_share)
    random = predicted & ~masked & (how < config.mask_token_share + config.random_token_share)
    out_BL = np.where(masked, np.int64(tokenizer.mask_id or 0), tokens_BL)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), specials)
    return np.where(random, ordinary[fresh % np.uint64(len(ordinary))], out_BL), labels_BL


def special_ids(tokenizer: TokenizerInfo) -> list[int]:
    """Ids that stand for no text: padding, unknown, both ends, mask."""
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id)
    return [number for number in ids if number is not None]


def next_tokens(tokens_BL: Ints, tokenizer: TokenizerInfo, isolate_documents: bool) -> Ints:
    """labels_BL for causal language modelling: the token that follows each.

    IGNORE at the end, before padding and, if documents are isolated, across them.
    """
    labels_BL = np.full_like(tokens_BL, IGNORE)
    labels_BL[:, :-1] = tokens_BL[:, 1:]
    labels_BL[labels_BL == tokenizer.pad_id] = IGNORE
    if isolate_documents:
        labels_BL[tokens_BL == tokenizer.eos_id] = IGNORE
    return labels_BL


def only_span_ends(labels_BL: Ints, heights_BL: Ints, lowest: int) -> Ints:
    """The labels whose word ends a span of level `lowest` or higher, the others IGNORE."""
    ends_BL = np.zeros(labels_BL.shape, bool)
    ends_BL[:, :-1] = heights_BL[:, 1:] >= lowest  # a label is the word that follows
    return np.where(ends_BL, labels_BL, IGNORE)


def attention(
    tokens_BL: Ints, tokenizer: TokenizerInfo, causal: bool, isolate_documents: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(attention mask, position ids), each None where the model's own default serves.

    The mask is [B, 1, L, L] bool, True where a query sees a key; the position ids are [B, L] int64.
    """
    is_pad = tokens_BL == tokenizer.pad_id
    if not isolate_documents and not is_pad.any():
        return None, None
    ends = tokens_BL == tokenizer.eos_id
    documents_BL = np.cumsum(ends, axis=1) - ends if isolate_documents else np.zeros_like(tokens_BL)
    # Padding sees padding: a query that sees nothing would give NaN.
    documents_BL = np.where(is_pad, -1, documents_BL)
    sees = documents_BL[:, :, None] == documents_BL[:, None, :]
    if causal:
        sees &= np.tri(tokens_BL.shape[1], dtype=bool)
    positions = None
    if isolate_documents:
        index = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
        starts = np.maximum.accumulate(
            np.where(np.diff(documents_BL, axis=1, prepend=documents_BL[:, :1]) != 0, index, 0), axis=1
        )
        positions = torch.from_numpy(index - starts)
    return torch.from_numpy(sees[:, None]), positions


# ------------------------------------------------------------------------------------------------ reading


class Samples(Dataset[Batch]):
    """Micro-batches by their positions in the stream of samples, with what a teacher needs or said where that is set."""

    def __init__(
        self, config: DataConfig, split: str, seed: int, shuffle: bool, targets: TargetReader | None = None
    ) -> None:
        self.config, self.seed, self.targets = config, seed, targets
        self.retokenizer: Retokenizer | None = None
        self.reader = ShardReader(Path(config.shards), split)
        self.window = config.shuffle_window if shuffle else 1
        self.tokenizer = self.reader.index.tokenizer
        self.sequence_length = self.reader.index.sequence_length
        if config.task == "mlm" and self.tokenizer.mask_id is None:
            raise ValueError(
                f"{config.shards}: its tokenizer has no mask token; task mlm needs one (or use data.task=clm)"
            )
        self.spans = SpanReader(config.shards, split) if config.span_depth else None
        if self.spans and config.span_depth >= self.spans.levels:
            raise ValueError(
                f"data.span_depth={config.span_depth}: the grammar of {config.shards} has {self.spans.levels} levels, "
                f"so that depths up to {self.spans.levels - 1} leave words out; 0 counts all"
            )

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def fingerprint(self) -> str:
        """Says whether two folders hold the same samples in the same order, told the same to the teacher."""
        shards = self.reader.index.splits[self.reader.split].shards
        told = self.retokenizer.info.sha256 if self.retokenizer else ""
        return hashlib.sha256("".join([*(shard.sha256 for shard in shards), told]).encode()).hexdigest()

    @property
    def question(self) -> dict[str, Any]:
        """All that decides which samples come where in the stream, and which of their rows count."""
        of_task = {"mlm": ("mask_rate", "mask_token_share", "random_token_share"), "clm": ("span_depth",)}
        keys = ("task", "isolate_documents", *of_task[self.config.task])
        told = {f"data.{key}": getattr(self.config, key) for key in keys}
        order = {"seed": self.seed, "data.shuffle_window": self.window}
        return {"data": self.fingerprint, "sequence_length": self.sequence_length, **order, **told}

    def __getitem__(self, positions: Ints) -> Batch:
        epochs_B, ids_B = sample_ids(positions, len(self), self.window, self.seed)
        tokens_BL = np.stack([self.reader[int(i)] for i in ids_B]).astype(np.int64)
        causal = self.config.task == "clm"
        if causal:
            inputs_BL, labels_BL = (
                tokens_BL,
                next_tokens(tokens_BL, self.tokenizer, self.config.isolate_documents),
            )
            if self.spans:
                heights_BL = heights_of(np.stack([self.spans[int(i)] for i in ids_B]))
                labels_BL = only_span_ends(labels_BL, heights_BL, self.spans.levels - self.config.span_depth)
        else:
            inputs_BL, labels_BL = mask_tokens(
                tokens_BL, epochs_B, ids_B, self.config, self.tokenizer, self.seed
            )
        mask, position_ids_BL = attention(tokens_BL, self.tokenizer, causal, self.config.isolate_documents)
        labels = torch.from_numpy(labels_BL).flatten()
        rows_N = (labels != IGNORE).nonzero().squeeze(1)
        num_tokens = int((tokens_BL != self.tokenizer.pad_id).sum())
        targets = None
        if self.targets:
            targets = self.targets.read(positions, epochs_B, ids_B, (labels_BL != IGNORE).sum(1).tolist())
        return Batch(
            Inputs(torch.from_numpy(inputs_BL), mask, position_ids_BL),
            rows_N,
            labels[rows_N],
            num_tokens,
            ids_B,
            targets,
            retold=self._retold(tokens_BL, labels != IGNORE) if self.retokenizer else None,
        )

    def _retold(self, tokens_BL: Ints, counted: Tensor) -> Retold:
        assert self.retokenizer is not None
        info, isolate = self.retokenizer.info, self.config.isolate_documents
        told_BL, pairs_M2 = self.retokenizer(tokens_BL)
        own_M, other_M = torch.from_numpy(pairs_M2).unbind(1)
        both = counted[own_M]
        inputs = Inputs(torch.from_numpy(told_BL), *attention(told_BL, info, True, isolate))
        return Retold(inputs, other_M[both], (counted.cumsum(0) - 1)[own_M[both]])


def micro_batch_positions(
    consumed: int, batch_size: int, micro: int, rank: int, world_size: int
) -> Iterator[Ints]:
    """Positions of this rank's micro-batches from `consumed` samples on, without end.

    Rank r has the r-th share of every batch.
    """
    share = batch_size // world_size
    while True:
        first = consumed + rank * share
        for start in range(first, first + share, micro):
            yield np.arange(start, min(start + micro, first + share))
        consumed += batch_size


def train_batches(
    samples: Samples, consumed: int, batch_size: int, micro: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's endless micro-batches after `consumed` samples of the run."""
    sampler = micro_batch_positions(consumed, batch_size, micro, rank, world_size)
    return batches_at(samples, sampler)


def validation_batches(
    samples: Samples, limit: int, micro: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's part of at most `limit` samples, spread over the split; the same ones at every validation.

    All ranks get the same number of batches, as ZeRO 3 needs it: the last of some may have no rows that count.
    """
    number = min(limit, len(samples))
    first, after = (number * r // world_size for r in (rank, rank + 1))
    positions = np.arange(first, after) * len(samples) // number
    parts = [positions[s : s + micro] for s in range(0, len(positions), micro)]
    largest_share = -(-number // world_size)
    missing = -(-largest_share // micro) - len(parts)
    fillers = [np.zeros(1, np.int64)] * missing
    for index, batch in enumerate(_loader(samples, iter([*parts, *fillers]))):
        yield batch if index < len(parts) else batch.without_rows()


def batches_at(samples: Samples, positions: Iterable[Ints]) -> Iterator[Batch]:
    """The micro-batches at these positions of the stream of samples."""
    return iter(_loader(samples, iter(positions)))


def _loader(samples: Samples, positions: Iterator[Ints]) -> DataLoader[Batch]:
    workers = samples.config.num_workers
    pin = torch.cuda.is_available()
    return DataLoader(samples, batch_size=None, sampler=positions, num_workers=workers, pin_memory=pin)
