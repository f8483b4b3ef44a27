"""Random sentences of a grammar with their parse spans: all sentences of a batch grow level by level, in numpy."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.grammars import Grammar
from data_prep.spans import encode_spans

_WIDEST = 3  # symbols of a rule, at most
_CHOICES = 12  # a multiple of 1, 2, 3 and 4, the numbers of rules that a symbol has


@dataclass(frozen=True)
class Sentences:
    """Terminals (1 to 3) of many sentences in one row, their span codes, and the length of each sentence."""

    words: np.ndarray  # uint8
    spans: np.ndarray  # uint16
    lengths: np.ndarray  # int64

    def at_most(self, length: int) -> "Sentences":
        """Those that have at most so many words."""
        fits = self.lengths <= length
        keep = np.repeat(fits, self.lengths)
        return Sentences(self.words[keep], self.spans[keep], self.lengths[fits])

    def first(self, number: int) -> "Sentences":
        end = int(self.lengths[:number].sum())
        return Sentences(self.words[:end], self.spans[:end], self.lengths[:number])


class Sampler:
    """An endless stream of sentences, a function of the grammar and the key alone (no library's distributions)."""

    def __init__(self, grammar: Grammar, *key: int) -> None:
        self.grammar = grammar
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def draw(self, number: int) -> Sentences:
        """The next `number` sentences."""
        grammar = self.grammar
        starts = np.array(grammar.starts, np.uint8)
        symbols = starts[self._choose(number) % len(starts)]
        ancestors = (symbols.astype(np.uint16) - 7) % 3
        heights = np.full(number, grammar.levels, np.uint8)
        last_of_sentence = np.arange(number)
        for level in range(grammar.levels - 1, -1, -1):
            children = self._table[symbols, self._choose(len(symbols)) % _CHOICES]
            there = children > 0
            widths = there.sum(axis=1)
            last_child = np.cumsum(widths) - 1
            symbols = children[there]
            ancestors = np.repeat(ancestors, widths)
            if level:
                ancestors = ancestors * 3 + (symbols - 7) % 3
            inherited, heights = heights, np.full(len(symbols), level, np.uint8)
            heights[last_child] = inherited
            last_of_sentence = last_child[last_of_sentence]
        lengths = np.diff(last_of_sentence, prepend=-1)
        return Sentences(symbols, encode_spans(heights, ancestors), lengths)

    def _choose(self, number: int) -> np.ndarray:
        return self._bits.random_raw(-(-number // 2)).astype("<u8").view("<u4")[:number]

    @cached_property
    def _table(self) -> np.ndarray:
        """uint8 [symbol, choice, 3]: the symbols of a rule, filled up with 0; every rule has the same chance."""
        table = np.zeros((max(self.grammar.rules) + 1, _CHOICES, _WIDEST), np.uint8)
        for symbol, productions in self.grammar.rules.items():
            for choice in range(_CHOICES):
                rule = productions[choice % len(productions)]
                table[symbol, choice, : len(rule)] = rule
        return table
