"""Sparse parity and its hierarchical generalisation: samples and labels as functions of (seed, stream, block)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Streams of samples of one seed: none of them shares a sample with another but by chance.
TEACHER, STUDENT, VALIDATION, PROBE = range(4)


@dataclass(frozen=True)
class Task:
    """x uniform on {-1, 1}^d; the label is the leaf that a walk down a binary tree of this depth ends in.

    Node v owns the k coordinates from v*k on and sends x left where their product is 1. With depth 1 this is
    (d, k)-sparse parity (Panigrahi et al., ICLR 2025, definition 3.1), class 0 where the product is 1. The leaf
    is the one with the largest score of the original: the sum over its ancestors of the product, negated to the right.
    """

    d: int
    k: int
    depth: int = 1

    @property
    def num_classes(self) -> int:
        return 2**self.depth

    @property
    def supports(self) -> list[list[int]]:
        """Coordinates of every node, root first, level by level."""
        return [list(range(v * self.k, (v + 1) * self.k)) for v in range(self.num_classes - 1)]

    def labels(self, x_ND: Tensor) -> Tensor:
        """int64 [N] for x [N, d] (any number of leading dimensions)."""
        nodes = self.num_classes - 1
        products = x_ND[..., : nodes * self.k].unflatten(-1, (nodes, self.k)).prod(-1)
        label = torch.zeros(products.shape[:-1], dtype=torch.int64, device=x_ND.device)
        node = torch.zeros_like(label)
        for _ in range(self.depth):
            goes_right = (products.gather(-1, node[..., None])[..., 0] < 0).long()
            label, node = 2 * label + goes_right, 2 * node + 1 + goes_right
        return label

    def right_of(self) -> Tensor:
        """float32 [classes, nodes]: 1 where the leaf lies to the right of the node."""
        member = torch.zeros(self.num_classes, self.num_classes - 1)
        for leaf in range(self.num_classes):
            node = 0
            for level in reversed(range(self.depth)):
                goes_right = leaf >> level & 1
                member[leaf, node] = goes_right
                node = 2 * node + 1 + goes_right
        return member


def samples(task: Task, seed: int, stream: int, block: int, num: int) -> Tensor:
    """float32 [num, d] of -1 and 1. Blocks are apart, so that a run can go on at any of them."""
    rng = np.random.default_rng((stream, seed, block))
    data = rng.integers(0, 256, -(-num * task.d // 8), dtype=np.uint8)
    bits = np.unpackbits(data, count=num * task.d).reshape(num, task.d)
    return torch.from_numpy(bits).float().mul_(-2).add_(1)
