"""The five context-free grammars of "Physics of Language Models" (Allen-Zhu & Li 2023), and a parser for them.

Every rule has the same chance among those of its symbol. Symbols stand on levels: terminals 1 to 3 on level 0,
7 to 9 on level 1, and so on up to the root 22 on level 6; a rule leads from one level to the next below.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TERMINALS = (1, 2, 3)
ROOT_LEVEL = 6
# Rules as the progressive-distillation code ships them. Its cfg3b has a single rule for 9.
_TEXTS = {
    "cfg3b": """22 21.20|20.19; 21 18.16|16.18.17; 20 17.16.18|16.17; 19 16.17.18|17.18.16; 18 15.14.13|14.13;
        17 14.13.15|15.13.14; 16 15.13|13.15.14; 15 12.11.10|11.12.10; 14 11.10.12|10.11.12; 13 11.12|12.11;
        12 8.9.7|9.7.8; 11 8.7.9|7.8.9; 10 7.9.8|9.8.7; 9 3.2.1; 8 3.2|3.1.2; 7 3.1|1.2.3""",
    "cfg3f": """22 20.21|20.19.21|21.19.19|20.20; 21 18.17|17.16|16.17.18|16.18; 20 16.16|16.17|17.16.18;
        19 18.16.18|17.18|18.18; 18 14.15.13|15.13.13|13.15; 17 15.14.13|14.15|15.14; 16 15.15|13.15.13|14.13|14.14;
        15 10.11.11|11.11.10|10.10|12.12.11; 14 10.12|12.10.12|12.11|10.12.12; 13 11.12|12.11.12|10.12.11;
        12 7.9.7|9.8|8.8.9; 11 8.8|9.7|9.7.7; 10 8.9.9|9.7.9|7.9.9; 9 1.2.1|3.3|1.1; 8 3.1.1|1.2|3.3.1;
        7 2.2.1|3.2.2|3.1.2|3.2""",
    "cfg3g": """22 19.20|20.20.19|20.19.21; 21 16.16|16.16.18|18.16; 20 16.17|18.18|16.17.17; 19 17.17.16|18.17.16|18.16.17;
        18 15.13|15.15|14.13.15; 17 14.13.14|14.15.13|15.14; 16 14.13.13|13.14|13.13; 15 10.11|12.10.10|12.11;
        14 11.12|10.11.10|10.10; 13 10.12|11.11.11|11.11; 12 7.9|7.8|9.9.9; 11 8.8.9|9.7|8.9.7; 10 8.8.8|7.7.7|7.7;
        9 2.3.3|2.3|2.1; 8 1.3.2|1.3|3.3.1; 7 2.3.1|1.1|2.2""",
    "cfg3h": """22 20.20.21|19.21; 21 17.17.18|17.18.17; 20 18.16|17.16; 19 16.17|18.17; 18 15.13.13|15.14.14|14.15.15;
        17 13.14|15.13.15; 16 14.13|15.13; 15 10.12|11.11.10; 14 10.12.12|10.10|12.12.10; 13 12.11|11.10;
        12 7.9|8.7|9.8; 11 8.7.7|7.7|7.9.9; 10 8.7.9|9.7|8.8; 9 2.1.3|1.3.3; 8 1.2|3.3.1|1.3; 7 2.3.2|1.2.3|1.3.1""",
    "cfg3i": """22 19.19.20|21.20.19; 21 16.16.18|18.17; 20 17.16.17|18.18; 19 18.16.18|16.16; 18 14.15.13|14.15;
        17 15.15|15.14; 16 13.13|14.14; 15 11.11.10|11.10.12; 14 10.10.10|10.10; 13 12.11|10.12.11; 12 7.9.9|8.7;
        11 7.7.7|7.7.8; 10 8.7.7|9.9; 9 1.1.3|1.2; 8 1.1|2.2; 7 3.1.2|2.3.1""",
}
NAMES = tuple(_TEXTS)

Rules = dict[int, tuple[tuple[int, ...], ...]]


def level_of(symbol: int) -> int:
    """0 for terminals, 1 for 7 to 9, ..., 6 for the root."""
    return 0 if symbol in TERMINALS else (symbol - 7) // 3 + 1


@dataclass(frozen=True)
class Grammar:
    """Sentences of the `levels` lowest levels: below the root's level, any symbol of that level begins one."""

    name: str
    levels: int
    rules: Rules

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Symbols that a sentence begins with, each as likely as the others."""
        return tuple(sorted(symbol for symbol in self.rules if level_of(symbol) == self.levels))

    @cached_property
    def length_chances(self) -> np.ndarray:
        """float64 [longest + 1]: chance of a sentence of so many terminals."""
        known = {symbol: np.array([0.0, 1.0]) for symbol in TERMINALS}
        for symbol in sorted(self.rules):
            products = [_convolved([known[part] for part in rule]) for rule in self.rules[symbol]]
            known[symbol] = _mean(products)
        return _mean([known[symbol] for symbol in self.starts])

    @property
    def longest(self) -> int:
        return len(self.length_chances) - 1

    def derives(self, sentence: list[int]) -> bool:
        """Whether some derivation of the grammar gives this sentence of terminals."""
        found = _ends_by_symbol(self, sentence)
        whole = 1 << len(sentence)
        return any(found[symbol][0] & whole for symbol in self.starts)


def load_grammar(name: str, levels: int = ROOT_LEVEL) -> Grammar:
    """One of the five; ValueError says which there are and which levels sentences can begin at."""
    if name not in _TEXTS:
        raise ValueError(f"unknown grammar {name!r}; there are {', '.join(NAMES)}")
    if not 1 <= levels <= ROOT_LEVEL:
        raise ValueError(f"--levels {levels}: a number from 1 to {ROOT_LEVEL} (the root's) expected")
    rules: Rules = {}
    for line in _TEXTS[name].split(";"):
        symbol, _, productions = line.strip().partition(" ")
        rules[int(symbol)] = tuple(tuple(map(int, rule.split("."))) for rule in productions.split("|"))
    return Grammar(name, levels, {s: rules[s] for s in sorted(rules) if level_of(s) <= levels})


def _convolved(chances: list[np.ndarray]) -> np.ndarray:
    product = chances[0]
    for other in chances[1:]:
        product = np.convolve(product, other)
    return product


def _mean(chances: list[np.ndarray]) -> np.ndarray:
    total = np.zeros(max(map(len, chances)))
    for chance in chances:
        total[: len(chance)] += chance / len(chances)
    return total


def _ends_by_symbol(grammar: Grammar, sentence: list[int]) -> dict[int, list[int]]:
    """symbol -> for each start a number whose bit e is set where the symbol can give sentence[start:e]."""
    size = len(sentence) + 1
    found = {t: [(word == t) << (i + 1) for i, word in enumerate(sentence)] + [0] for t in TERMINALS}
    for symbol, productions in sorted(grammar.rules.items()):
        found[symbol] = [0] * size
        for start in range(size):
            for rule in productions:
                found[symbol][start] |= _ends_of_rule(rule, start, found)
    return found


def _ends_of_rule(rule: tuple[int, ...], start: int, found: dict[int, list[int]]) -> int:
    ends = 1 << start
    for part in rule:
        reached = 0
        while ends:
            last = ends.bit_length() - 1
            reached |= found[part][last]
            ends ^= 1 << last
        ends = reached
    return ends
