"""A teacher's distribution cut to few classes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SparseTargets(NamedTuple):
    """What a teacher said of each row, cut to K classes.

    ids_NK: int64, distinct within a row where probs_NK is not 0; entries of probability 0 are padding, whatever
    their id. probs_NK: float32, the teacher's probabilities, not renormalised. tail_N: float32, the mass of all
    other classes as one bucket; None leaves them out. gold_N: float32, the teacher's probability of the row's
    label; where the label is not among the ids it becomes one more entry, taken out of the tail.
    """

    ids_NK: Tensor
    probs_NK: Tensor
    tail_N: Tensor | None = None
    gold_N: Tensor | None = None
