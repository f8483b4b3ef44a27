"""What `heads` of a term says it costs is what it multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from term_case import IN_ANY_RUN, PADDED, WIDTHS, seen_case
from torch.utils._python_dispatch import TorchDispatchMode

from distill.objectives.terms import TERMS

ROWS = 12


class Products(TorchDispatchMode):
    """Rows that met the last layer of student and teacher, by the shapes of matrix products, backward ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = [0, 0]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            (m, k), (_, n) = (x.shape for x in args[-2:])
            for side, width in enumerate(WIDTHS):
                if width in (m, k, n) and PADDED in (m, k, n):
                    self.rows[side] += m * k * n // width // PADDED
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", IN_ANY_RUN)
def test_rows_meet_the_last_layers_as_often_as_the_term_says(name: str) -> None:
    with Products() as products:
        seen = seen_case(ROWS, learns=name)  # with what a teacher says before it is asked
        value = TERMS[name].function(seen)
        mixed_ND = seen.student.inside.mixed_ND
        assert mixed_ND is not None
        leaves = [seen.student.hidden_ND, seen.student.head.weight_VD, mixed_ND]
        learned = [p for module in seen.learned.values() for p in module.parameters()]
        torch.autograd.grad(value, [*leaves, *learned], allow_unused=True)
    overlap = {"ckd": 1}.get(name, 0)  # rows that a chunk of three has beside its own
    assert [n / ROWS / (3 + overlap) * 3 for n in products.rows] == list(TERMS[name].heads)
