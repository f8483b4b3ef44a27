"""How far a prediction rests on the words next to it (Panigrahi et al., ICLR 2025: M_robust and M_close).

For a place i, p is the model's prediction there from all it may see, TV the total variation distance (0 to 1):

    M_robust(n) = TV(p, prediction with the n-gram around i hidden)        large: it leans on the n-gram
    M_close(n)  = TV(p, prediction with all but the n-gram around i hidden)  small: the n-gram is enough

Masked models: hidden words are `<mask>`, and so is word i in all three; the n-gram reaches from i - n//2 to
i + (n-1)//2. Causal models have no mask: the n-gram is the n - 1 words before i; to hide it they become random
words of the data, to hide all else no word sees further back than it.
The paper's code reports the L1 norm, which is twice the total variation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.data import Samples, attention, special_ids
from distill.models import Inputs, counted_rows
from distill.sample_order import Ints

_SEED = 0  # of the random words that hide a causal model's n-gram


@dataclass(frozen=True)
class Places:
    """K predictions to be probed: tokens_KL the sequence of each, at_K the place of its word."""

    tokens_KL: Ints
    at_K: Ints


def choose_places(samples: Samples, sequences: int, per_sequence: int, sizes: Sequence[int]) -> Places:
    """`per_sequence` places in each of `sequences` samples, both evenly spread; words alone stand in every n-gram.

    Raises:
        ValueError: no sequence has such a place.
    """
    number = min(sequences, len(samples))
    rows = [samples.reader[int(i)].astype(np.int64) for i in np.arange(number) * len(samples) // number]
    specials = special_ids(samples.tokenizer)
    before, after = _reach(max(sizes), samples.config.task)
    tokens, at = [], []
    for row in rows:
        runs = np.concatenate([[0], np.cumsum(~np.isin(row, specials))])  # words before each place
        centres = np.arange(before, len(row) - after)
        words_around = runs[centres + after + 1] - runs[centres - before]
        valid = centres[words_around == before + after + 1]
        asked = min(per_sequence, len(valid))
        tokens += [row] * asked
        at += [int(valid[k * len(valid) // asked]) for k in range(asked)]
    if not tokens:
        raise ValueError(
            f"{samples.config.shards}: no sequence has {before + after + 1} words in a row, which n-grams of "
            f"{max(sizes)} need: ask for smaller --ngrams"
        )
    return Places(np.stack(tokens), np.array(at))


def _reach(size: int, task: str) -> tuple[int, int]:
    """Words of the n-gram before and after the place; a causal model needs one more to be hidden."""
    return (size // 2, (size - 1) // 2) if task == "mlm" else (size, 0)


@torch.no_grad()
def ngram_dependence(
    model: PreTrainedModel, samples: Samples, places: Places, sizes: Sequence[int], micro: int
) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile over the places of `robust_n` and `close_n`, for every n in sizes."""
    found: dict[str, list[Tensor]] = {f"{kind}_{n}": [] for n in sizes for kind in ("robust", "close")}
    others_KL = _random_words(places, samples)
    for first in range(0, len(places.at_K), micro):
        chunk = slice(first, first + micro)
        part = Places(places.tokens_KL[chunk], places.at_K[chunk])
        questions = (
            _masked(part, samples, sizes)
            if samples.config.task == "mlm"
            else _causal(part, samples, sizes, others_KL[chunk])
        )
        _, inputs = next(questions)
        whole = _predict(model, inputs, part, samples)
        for name, inputs in questions:
            hidden = _predict(model, inputs, part, samples)
            found[name].append((whole - hidden).abs().sum(dim=1) / 2)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return {
        name: torch.quantile(torch.cat(parts).double(), quartiles).tolist() for name, parts in found.items()
    }


def _predict(model: PreTrainedModel, inputs: Inputs, places: Places, samples: Samples) -> Tensor:
    """Probabilities [K, V] of the word at each place, on the CPU."""
    length = places.tokens_KL.shape[1]
    row = places.at_K - (samples.config.task == "clm")
    rows = torch.from_numpy(np.arange(len(row)) * length + row).to(model.device)
    ids, mask, positions = (None if t is None else t.to(model.device) for t in inputs)
    assert ids is not None
    answer = counted_rows(model, Inputs(ids, mask, positions), rows)
    return answer.head(answer.hidden_ND)[:, : samples.tokenizer.vocab_size].float().softmax(dim=1).cpu()


def _masked(places: Places, samples: Samples, sizes: Sequence[int]) -> Iterator[tuple[str, Inputs]]:
    """The sequences with word i masked, then, by name, with more masked."""
    tokens, info = places.tokens_KL, samples.tokenizer
    offset = np.arange(tokens.shape[1]) - places.at_K[:, None]
    is_word = ~np.isin(tokens, special_ids(info))

    def asked(masked: np.ndarray) -> Inputs:
        ids = np.where(masked & is_word | (offset == 0), np.int64(info.mask_id or 0), tokens)
        return Inputs(torch.from_numpy(ids), *_attention(tokens, samples))

    yield "", asked(offset == 0)
    for n in sizes:
        before, after = _reach(n, "mlm")
        in_ngram = (offset >= -before) & (offset <= after)
        yield f"robust_{n}", asked(in_ngram)
        yield f"close_{n}", asked(~in_ngram)


def _random_words(places: Places, samples: Samples) -> Ints:
    """int64 [K, L] words of these sequences, for all places at once: whatever the chunks, the same ones hide an n-gram."""
    tokens = places.tokens_KL
    words = tokens[~np.isin(tokens, special_ids(samples.tokenizer))]
    return np.random.default_rng(_SEED).choice(words, tokens.shape)


def _causal(
    places: Places, samples: Samples, sizes: Sequence[int], others_KL: Ints
) -> Iterator[tuple[str, Inputs]]:
    """The sequences as they are, then, by name, with the n-gram replaced and with all before it out of sight."""
    tokens = places.tokens_KL
    offset = np.arange(tokens.shape[1]) - places.at_K[:, None]
    mask, positions = _attention(tokens, samples)
    yield "", Inputs(torch.from_numpy(tokens), mask, positions)
    for n in sizes:
        in_ngram = (offset < 0) & (offset > -n)
        yield f"robust_{n}", Inputs(torch.from_numpy(np.where(in_ngram, others_KL, tokens)), mask, positions)
        yield f"close_{n}", Inputs(torch.from_numpy(tokens), _only_from(offset > -n, mask), positions)


def _attention(tokens_KL: Ints, samples: Samples) -> tuple[Tensor | None, Tensor | None]:
    config = samples.config
    return attention(tokens_KL, samples.tokenizer, config.task == "clm", config.isolate_documents)


def _only_from(seen_KL: np.ndarray, mask: Tensor | None) -> Tensor:
    """A causal mask [K, 1, L, L] in which the words not in `seen_KL` are seen by none but themselves."""
    length = seen_KL.shape[1]
    itself = np.eye(length, dtype=bool)
    sees = torch.from_numpy((seen_KL[:, None, :] & np.tri(length, dtype=bool)) | itself)[:, None]
    return sees if mask is None else sees & mask
