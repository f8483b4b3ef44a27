"""The same texts in the tokens of a teacher with another tokenizer, and which of both sides' tokens end together.

What two causal models make of the same characters can be compared, whatever words either knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.encoding import HUGGINGFACE_NAME, HuggingFaceTokenizer, SpellsControl, load_tokenizer
from data_prep.shards import TokenizerInfo
from distill.sample_order import Ints


class Retokenized(NamedTuple):
    """Token ids [B, L'] for the teacher, padded at the end; pairs_M2: int64 (position in B * L, in B * L') of each pair."""

    tokens_BL: Ints
    pairs_M2: Ints


class Retokenizer:
    """From the tokens of the shards to those of another tokenizer, by way of the text between control tokens.

    An end of a document stands for an end, a beginning for a beginning; where only the teacher marks beginnings, one
    follows each end. A sequence ends for the teacher where its text can't be told: at a token that stands for an
    unknown text, or before a document in which the teacher's tokenizer finds a control token.
    """

    def __init__(self, shards: Path, own: TokenizerInfo, folder: Path) -> None:
        """Raises ValueError where `folder` was not made by `python -m data_prep tokenizer`, or holds the shards' own."""
        self.info = load_tokenizer(folder).info
        if load_tokenizer(shards / "tokenizer").info != own:
            raise ValueError(f"{shards}/tokenizer is not the tokenizer that {shards}/index.json names")
        if self.info.sha256 == own.sha256:
            raise ValueError(
                f"teacher.tokenizer={folder} is the tokenizer of {shards} itself: leave it out, and every objective can be used"
            )
        self._own = HuggingFaceTokenizer(shards / "tokenizer" / HUGGINGFACE_NAME, own)
        self._other = HuggingFaceTokenizer(folder / HUGGINGFACE_NAME, self.info)
        begins = self.info.begin_ids
        self._marks = {own.pad_id: [], own.eos_id: [self.info.eos_id, *([] if own.begin_ids else begins)]}
        self._marks |= {number: begins for number in own.begin_ids}

    def __call__(self, tokens_BL: Ints) -> Retokenized:
        """A sequence of the teacher is cut where it would be longer than one of the student; its pairs end there."""
        length = tokens_BL.shape[1]
        told = [self._sequence(tokens_L) for tokens_L in tokens_BL]
        longest = max(1, min(length, max(len(ids) for ids, _ in told)))
        out_BL = np.full((len(told), longest), self.info.pad_id, np.int64)
        pairs: list[tuple[int, int]] = []
        for b, (ids, both) in enumerate(told):
            out_BL[b, : len(ids)] = ids[:longest]
            pairs += [(b * length + i, b * longest + j) for i, j in both if j < longest]
        return Retokenized(out_BL, np.array(pairs, np.int64).reshape(-1, 2))

    def _sequence(self, tokens_L: Ints) -> tuple[list[int], list[tuple[int, int]]]:
        """(the teacher's ids, pairs of positions in both sequences) of one sequence."""
        unknown = np.flatnonzero(tokens_L == self._own.info.unk_id)
        tokens_L = tokens_L[: unknown[0]] if len(unknown) else tokens_L
        ids: list[int] = []
        pairs: list[tuple[int, int]] = []
        start = 0
        for place in [*np.flatnonzero(np.isin(tokens_L, list(self._marks))).tolist(), len(tokens_L)]:
            text, ends = self._own.decode_with_ends(tokens_L[start:place].tolist())
            try:
                words, word_ends = self._other.encode_with_ends(text)
            except SpellsControl:
                break
            at = {end: len(ids) + j for j, end in enumerate(word_ends) if end is not None}
            pairs += [(start + i, at[end]) for i, end in enumerate(ends) if end is not None and end in at]
            ids += words
            if place < len(tokens_L) and (marks := self._marks[int(tokens_L[place])]):
                ids += marks
                pairs.append((place, len(ids) - 1))
            start = place + 1
        return ids, pairs
