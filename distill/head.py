"""The last linear layer of a language model, the one that meets the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Head(NamedTuple):
    """Makes logits_NV of hidden_ND: hidden W^T + b, and with a softcap c of that x: c * tanh(x / c).

    weight_VD: one row a class. bias_V: None if the layer has none. All floating, of the hidden states' dtype.
    softcap: above 0; None caps nothing (Gemma 2 report, 2024, section 2).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None

    @property
    def num_classes(self) -> int:
        return self.weight_VD.shape[0]

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """All logits [N, V] at once; `distill.kernels.linear_divergence` never holds them."""
        logits_NV = linear(
            hidden_ND, self.weight_VD, self.bias_V
        )  # to the bit what the model's own layer says
        return logits_NV if self.softcap is None else self.softcap * (logits_NV / self.softcap).tanh()


class Mixture(NamedTuple):
    """Several models' heads as one, a row's weights beside its hidden states.

    hidden_NE: the members' hidden states side by side, then a column a member, the logarithm of its weight; only
    their differences within a row matter. With p_nm = softmax(head_m(hidden_m)) logits are log sum_m w_nm p_nm, the mean
    of probabilities, or for `of_logs` sum_m w_nm log p_nm, the mean of logarithms (up to a constant a row).
    heads: each of its own width; columns from `vocab_size` on are padding.
    """

    heads: tuple[Head, ...]
    vocab_size: int
    of_logs: bool = False

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    def split(self, hidden_NE: Tensor) -> tuple[list[Tensor], Tensor]:
        """(hidden states of each member, log weights_NM that sum to a mass of 1, float32 or better)."""
        *hidden, weights_NM = hidden_NE.split(
            [*(head.weight_VD.shape[1] for head in self.heads), len(self.heads)], dim=1
        )
        wide = torch.promote_types(weights_NM.dtype, torch.float32)
        return hidden, weights_NM.to(wide).log_softmax(1)

    def __call__(self, hidden_NE: Tensor) -> Tensor:
        """All log-probabilities [N, V] at once."""
        return self.mixed(hidden_NE, [head.__call__ for head in self.heads])

    def mixed(self, hidden_NE: Tensor, layers: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """The same with `layers` in the heads' place: each makes a member's logits, which need not outlive the next."""
        hidden, weights_NM = self.split(hidden_NE)
        mixed_NV = None
        for number, (layer, hidden_ND) in enumerate(zip(layers, hidden, strict=True)):
            logits_NV = layer(hidden_ND)[:, : self.vocab_size]
            mixed_NV = self._with(mixed_NV, logits_NV, weights_NM[:, number])
        assert mixed_NV is not None, "a mixture has members"
        return mixed_NV

    def _with(self, mixed_NV: Tensor | None, logits_NV: Tensor, log_weight_N: Tensor) -> Tensor:
        """One member more, in place where `mixed` is there, in the dtype of the weights."""
        log_p_NV = logits_NV.log_softmax(1, dtype=log_weight_N.dtype)
        if self.of_logs:
            log_p_NV.mul_(log_weight_N.exp()[:, None])
            return log_p_NV if mixed_NV is None else mixed_NV.add_(log_p_NV)
        log_p_NV.add_(log_weight_N[:, None])
        return log_p_NV if mixed_NV is None else torch.logaddexp(mixed_NV, log_p_NV, out=mixed_NV)


class Pooled(NamedTuple):
    """What several teachers say together of the rows that count; no single model stands behind it."""

    hidden_ND: Tensor  # as hidden_NE of Mixture
    head: Mixture
