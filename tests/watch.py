"""Watches every operation of PyTorch: memory, logits, matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """What happens inside: most bytes alive at once, most rows of a tensor as wide as the vocabulary, products."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.peak_bytes = self.most_rows = self.num_products = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {StorageWeakRef(t.untyped_storage()) for t in args if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        self.num_products += function.overloadpacket in (
            torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_
        )  # fmt: skip
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                is_wide = tensor.dim() > 1 and tensor.shape[-1] - self.vocabulary in range(64)  # with padding
                if is_wide and tensor.is_floating_point():
                    self.most_rows = max(self.most_rows, tensor.numel() // tensor.shape[-1])
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference not in known:
                    self._alive[reference] = tensor.untyped_storage().nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))
        return result
