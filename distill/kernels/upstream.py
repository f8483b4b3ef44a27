"""The end of every backward: a gradient made in forward, times the gradient of the loss."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version


def scale_(gradient: Tensor, loss_grad: Tensor) -> Tensor:
    """`gradient` times the 0-d `loss_grad`, in place; a 1 is not multiplied by, which would be a pass over it all.

    A GPU finds that out by itself and is not waited for. PyTorch refuses to use `gradient` for a second backward.
    """
    increment_version(gradient)  # as a multiplication by PyTorch does
    if gradient.device.type == "cpu":
        return gradient if loss_grad.item() == 1 else gradient.mul_(loss_grad)
    from distill.kernels import gpu  # takes a second to import, which a run on CPU need not wait for

    return gradient.mul_(loss_grad) if gpu.problem_with(gradient, None) else gpu.scale_(gradient, loss_grad)
