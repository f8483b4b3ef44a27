"""Which units of a student are pruned when, while it learns (HomoDistil, ICLR 2023, section 3).

The paper also narrows what lies between layers (hidden_size); that is not done here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.config import Config
from distill.distributed import World
from distill.units import Units, without_closed

FILE = "gates.pt"  # in a checkpoint
SMOOTHING = 0.85  # of importance over steps: beta_1 of PLATON (ICML 2022), without its bonus for uncertainty


class Pruning:
    """Closes the least important units of each layer, a few a step, for good. Alike on all ranks.

    A unit's importance is |gate * dloss/dgate| of the whole batch, smoothed over steps. That is the paper's
    |theta . dloss/dtheta| with theta the weights that read the unit.
    """

    def __init__(self, model: PreTrainedModel, config: Config) -> None:
        """Gates into `model` for what `config` prunes, if anything. Raises ValueError if it can't be pruned so."""
        self.steps, self._budget = 0, config.steps
        self._start, self._until = config.optim.warmup_share, config.model.prune_until
        to = config.model.prune_to
        self._kinds = [Units(model, kind) for kind in to]
        self._finals = [_final(units, to[units.kind], model.config.model_type) for units in self._kinds]
        self._importance = [torch.zeros_like(units.gates_LU) for units in self._kinds]

    @property
    def left(self) -> dict[str, int]:
        """Units that are left in each layer, by kind, as a row of metrics names them."""
        return {f"{units.kind}_left": units.left for units in self._kinds}

    def step(self, world: World) -> None:
        """Weigh the units by the gradients of one step, and prune what is due after it. Collective."""
        self.steps += 1
        share = self.steps / self._budget
        for units, final, importance_LU in zip(self._kinds, self._finals, self._importance, strict=True):
            gradient_LU = units.take_gradient()
            if world.size > 1:
                torch.distributed.all_reduce(gradient_LU)  # the same bits on every rank
            # Over the ranks, by whose number the engine has scaled the loss up: of one size after a change of theirs.
            importance_LU.lerp_((units.gates_LU * gradient_LU / world.size).abs(), 1 - SMOOTHING)
            due = units_left(units.number, final, share, self._start, self._until)
            close_least(units, importance_LU, next(count for count in units.counts if count >= due))

    def save(self, folder: Path) -> None:
        """Write what decides all further pruning; no file where nothing is pruned."""
        if self._kinds:
            state = {
                units.kind: [units.gates_LU, importance_LU]
                for units, importance_LU in zip(self._kinds, self._importance, strict=True)
            }
            torch.save({"steps": self.steps, **state}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Take up what `save` left. Raises OSError, KeyError or ValueError if it isn't there or is of another model."""
        if not self._kinds:
            return
        state = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        self.steps = state["steps"]
        for units, importance_LU in zip(self._kinds, self._importance, strict=True):
            gates_LU, stored_LU = state[units.kind]
            if gates_LU.shape != importance_LU.shape:
                raise ValueError(
                    f"gates of {list(gates_LU.shape)} layers and units, the model has {list(importance_LU.shape)}"
                )
            units.set(gates_LU)
            importance_LU.copy_(stored_LU)

    def cut(
        self, model: PreTrainedModel, weights: dict[str, Tensor]
    ) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """`model` and its state dict `weights`, or a smaller model without the pruned units and its own."""
        if not self._kinds:
            return model, weights
        smaller = without_closed(model, weights, self._kinds)
        return smaller, smaller.state_dict()


def units_left(number: int, final: int, share: float, start: float, until: float) -> int:
    """Units of a layer that are left after `share` of the budget: all until `start`, `final` from `until` on.

    In between (number - final) * (1 - x)^3 are still to go, x from 0 to 1: many at first, few at the end.
    """
    x = min(max((share - start) / (until - start), 0.0), 1.0)
    return final + round((number - final) * (1 - x) ** 3)


def close_least(units: Units, importance_LU: Tensor, left: int) -> None:
    """Close all but the `left` most important of the open units of each layer."""
    if left == units.left:
        return
    gates_LU = units.gates_LU
    # A closed one is never more important than an open one; of equals the first ones stay.
    open_LU = importance_LU.masked_fill(gates_LU == 0, -1.0)
    ranked_LU = open_LU.argsort(dim=1, descending=True, stable=True)
    units.set(torch.zeros_like(gates_LU).scatter_(1, ranked_LU[:, :left], 1.0))


def _final(units: Units, to: float, model_type: str) -> int:
    final, counts = round(to * units.number), units.counts
    if final not in counts:
        told = f"1 to {counts[-1]}" if len(counts) == counts[-1] else f"one of {counts}"
        raise ValueError(
            f"model.prune_to.{units.kind}={to} leaves {final} of {units.number} in each layer; a {model_type} of this "
            f"width can have {told}"
        )
    return final
