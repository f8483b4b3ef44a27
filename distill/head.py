"""The last linear layer of a language model, the one that meets the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

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

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """All logits [N, V] at once; `distill.kernels.linear_divergence` never holds them."""
        logits_NV = linear(
            hidden_ND, self.weight_VD, self.bias_V
        )  # to the bit what the model's own layer says
        return logits_NV if self.softcap is None else self.softcap * (logits_NV / self.softcap).tanh()
