"""A model as an estimate of probabilities: loss, top-1, Brier score, calibration, and the loss by word frequency.

Menon et al. 2020 ("Why distillation helps"): a teacher is as good as its probabilities, whatever its top-1. All
figures are means over the counted validation rows, against the label that came.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.shards import ShardReader
from distill.data import Samples, validation_batches
from distill.models import Rows, counted_rows
from distill.sample_order import Ints

BINS = 15  # of the confidence, equally wide (Guo et al. 2017)
_CHUNK_ROWS = 1024  # rows whose probabilities are alive at once
_COUNTED_SEQUENCES = 4096  # training sequences in which words are counted


def frequency_ranks(reader: ShardReader) -> Ints:
    """int64 [V]: the rank of each token, 0 for the most frequent, in training sequences spread over the split."""
    number = min(_COUNTED_SEQUENCES, len(reader))
    counts = np.zeros(reader.index.tokenizer.vocab_size, np.int64)
    for i in np.arange(number) * len(reader) // number:
        counts += np.bincount(reader[int(i)], minlength=len(counts))
    ranks = np.empty_like(counts)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return ranks


def bucket_names(vocab_size: int) -> list[str]:
    """Ranks by powers of ten: 1-10, 11-100, ..."""
    edges = [0, *(10**k for k in range(1, len(str(vocab_size))) if 10**k < vocab_size), vocab_size]
    return [f"{low + 1}-{high}" for low, high in zip(edges, edges[1:], strict=False)]


def buckets_of(ranks: Ints) -> Tensor:
    """int64 [V]: the bucket of `bucket_names` that each token's rank lies in."""
    ends = [int(name.split("-")[1]) for name in bucket_names(len(ranks))]
    return torch.from_numpy(np.searchsorted(ends, ranks, side="right"))


def word_buckets(samples: Samples) -> Tensor:
    """int64 [V]: the frequency bucket of each token in `samples`."""
    return buckets_of(frequency_ranks(samples.reader))


class _Sums:
    """Float64 sums over rows: of all, by bin of confidence, by bucket of the label's frequency."""

    def __init__(self, num_buckets: int) -> None:
        self.terms = torch.zeros(4, dtype=torch.float64)  # rows, log-loss, hits, Brier
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # rows, confidence, hits
        self.buckets = torch.zeros(3, num_buckets, dtype=torch.float64)  # rows, log-loss, hits

    def add(self, probabilities_NV: Tensor, log_p_N: Tensor, labels_N: Tensor, bucket_N: Tensor) -> None:
        """Rows of one chunk: probabilities, the label's log-probability, the label and its frequency bucket."""
        confidence_N, top_N = probabilities_NV.max(dim=1)
        hit_N = (top_N == labels_N).double()
        brier_N = probabilities_NV.square().sum(dim=1) - 2 * log_p_N.exp() + 1
        one_N = torch.ones_like(hit_N)
        self.terms += torch.stack([c.double().sum() for c in (one_N, -log_p_N, hit_N, brier_N)])
        bin_N = (confidence_N * BINS).long().clamp(max=BINS - 1)
        self.bins.index_add_(1, bin_N, torch.stack([one_N, confidence_N.double(), hit_N]))
        self.buckets.index_add_(1, bucket_N, torch.stack([one_N, -log_p_N.double(), hit_N]))

    def means(self, names: list[str]) -> dict[str, float]:
        """Named means; buckets without a row are left out."""
        rows, nll, hits, brier = self.terms.tolist()
        gap = (self.bins[1] - self.bins[2]).abs().sum().item()
        named = {
            "num_rows": rows,
            "loss": nll / rows,
            "accuracy": hits / rows,
            "brier": brier / rows,
            "ece": gap / rows,
        }
        for name, (count, loss, hit) in zip(names, self.buckets.T.tolist(), strict=True):
            if count:
                named |= {f"loss_rank_{name}": loss / count, f"accuracy_rank_{name}": hit / count}
        return named


@torch.no_grad()
def measure(
    model: PreTrainedModel, samples: Samples, ranks: Ints, limit: int, micro: int
) -> dict[str, float]:
    """Figures of a model on at most `limit` validation samples, masked as in every validation.

    loss: log-loss in nats a counted token; accuracy: top-1; brier: 0 to 2; ece: expected calibration error, 0 to 1;
    loss_rank_A-B and accuracy_rank_A-B: the same over labels whose frequency has these ranks.
    """
    names = bucket_names(len(ranks))
    bucket_of = buckets_of(ranks)
    sums = _Sums(len(names))
    for batch in validation_batches(samples, limit, micro, 0, 1):
        batch = batch.to(model.device)
        rows = counted_rows(model, batch.inputs, batch.rows_N)
        _add(sums, rows, batch.labels_N, bucket_of, samples.tokenizer.vocab_size)
    return sums.means(names)


def _add(sums: _Sums, rows: Rows, labels_N: Tensor, bucket_of: Tensor, vocab_size: int) -> None:
    for first in range(0, len(labels_N), _CHUNK_ROWS):
        chunk = slice(first, first + _CHUNK_ROWS)
        log_p_NV = rows.head(rows.hidden_ND[chunk])[:, :vocab_size].float().log_softmax(dim=1).cpu()
        labels = labels_N[chunk].cpu()
        log_p_N = log_p_NV.gather(1, labels[:, None]).squeeze(1)
        sums.add(log_p_NV.exp(), log_p_N, labels, bucket_of[labels])


def chance(samples: Samples, limit: int, micro: int) -> dict[str, float]:
    """Top-1 (accuracy) and log-loss, on the counted validation rows, of knowing how frequent each label is there."""
    counts = np.zeros(samples.tokenizer.vocab_size, np.int64)
    for batch in validation_batches(samples, limit, micro, 0, 1):
        counts += np.bincount(batch.labels_N.numpy(), minlength=len(counts))
    shares = counts[counts > 0] / max(1, counts.sum())
    return {"accuracy": float(shares.max(initial=0.0)), "loss": float(-(shares * np.log(shares)).sum())}
