"""Small networks, one a seed, computed side by side: every parameter has a leading dimension S of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distill.experiments.parity.task import Task

Params = dict[str, Tensor]
HEAD_WIDTH, LAYERS = 8, 2  # of the Transformer (appendix of Panigrahi et al.)
CHUNK_FLOATS = 2**19  # of hidden features alive at once where no gradient is needed: 2 MiB stay in a cache


@dataclass(frozen=True)
class Model:
    """A kind of network. Features a row: how many floats of its hidden state are alive at once."""

    # (task, width, standard deviation of the first weights, generator) -> one network
    init: Callable[[Task, int, float, torch.Generator], Params]
    forward: Callable[
        [Params, Tensor], Tensor
    ]  # (parameters [S, ...], x [S, N, d]) -> logits [S, N, classes]
    features_a_row: Callable[[Task, int], int]


def stacked(model: Model, task: Task, width: int, std: float, generators: list[torch.Generator]) -> Params:
    """Parameters [S, ...] of a network a generator, each as if it were made alone."""
    nets = [model.init(task, width, std, generator) for generator in generators]
    return {name: torch.stack([net[name] for net in nets]) for name in nets[0]}


@torch.no_grad()
def logits_of(model: Model, params: Params, x_SND: Tensor, features_a_row: int) -> Tensor:
    """Logits [S, N, classes] without a gradient, in chunks of rows."""
    rows = max(1, CHUNK_FLOATS // (x_SND.shape[0] * features_a_row))
    return torch.cat([model.forward(params, chunk) for chunk in x_SND.split(rows, dim=1)], dim=1)


# ------------------------------------------------------------------------------------------------ MLP


def _uniform(generator: torch.Generator, fan_in: int, *shape: int) -> Tensor:
    """PyTorch's default for a linear layer."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)


def _init_mlp(task: Task, width: int, _std: float, generator: torch.Generator) -> Params:
    return {
        "in.weight": _uniform(generator, task.d, width, task.d),
        "in.bias": _uniform(generator, task.d, width, 1),
        "out.weight": _uniform(generator, width, task.num_classes, width),
        "out.bias": _uniform(generator, width, task.num_classes, 1),
    }


def _mlp(params: Params, x_SND: Tensor) -> Tensor:
    # Features before samples: in this order the second layer, of few outputs, is several times faster on CPU.
    hidden_SWN = torch.baddbmm(params["in.bias"], params["in.weight"], x_SND.mT).relu_()
    return torch.baddbmm(params["out.bias"], params["out.weight"], hidden_SWN).mT


# ------------------------------------------------------------------------------------------------ Transformer


def _init_transformer(task: Task, width: int, std: float, generator: torch.Generator) -> Params:
    """GPT-2's: N(0, std), the layers that end a residual branch narrower; the output is not tied."""

    def normal(*shape: int, std: float = std) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    params = {"token": normal(2, width), "position": normal(task.d, width)}
    for i in range(LAYERS):
        ends = std / math.sqrt(2 * LAYERS)
        branches = (("qkv", 1, 3), ("proj", 1, 1), ("up", 1, 4), ("down", 4, 1))
        for name, n_in, n_out in ((name, a * width, b * width) for name, a, b in branches):
            params[f"{i}.{name}.weight"] = normal(n_in, n_out, std=ends if name in ("proj", "down") else std)
            params[f"{i}.{name}.bias"] = torch.zeros(1, n_out)
    for norm in (*(f"{i}.norm{j}" for i in range(LAYERS) for j in (1, 2)), "norm"):
        params[f"{norm}.weight"], params[f"{norm}.bias"] = torch.ones(1, width), torch.zeros(1, width)
    params["out.weight"], params["out.bias"] = (
        normal(width, task.num_classes),
        torch.zeros(1, task.num_classes),
    )
    return params


def _transformer(params: Params, x_SND: Tensor) -> Tensor:
    """Causal, normalised before each branch; a coordinate is token 0 (x = 1) or 1, the last position answers."""
    seeds, rows, length = x_SND.shape
    width = params["token"].shape[-1]
    token_SNL = ((1 - x_SND) / 2)[..., None]
    zero, one = params["token"][:, None, None].unbind(3)
    h = zero + token_SNL * (one - zero) + params["position"][:, None]  # [S, N, L, W]
    for i in range(LAYERS):
        qkv = _linear(params, f"{i}.qkv", _norm(params, f"{i}.norm1", h))
        q, k, v = qkv.reshape(seeds * rows, length, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(seeds, rows, length, width)
        h = h + _linear(params, f"{i}.proj", mixed)
        up = functional.gelu(_linear(params, f"{i}.up", _norm(params, f"{i}.norm2", h)), approximate="tanh")
        h = h + _linear(params, f"{i}.down", up)
    return _linear(params, "out", _norm(params, "norm", h[:, :, -1:]))[:, :, 0]


def _linear(params: Params, name: str, h: Tensor) -> Tensor:
    return torch.baddbmm(params[f"{name}.bias"], h.flatten(1, 2), params[f"{name}.weight"]).unflatten(
        1, h.shape[1:3]
    )


def _norm(params: Params, name: str, h: Tensor) -> Tensor:
    scale, shift = params[f"{name}.weight"][:, None], params[f"{name}.bias"][:, None]
    return functional.layer_norm(h, h.shape[-1:]) * scale + shift


MODELS = {
    "mlp": Model(_init_mlp, _mlp, lambda task, width: width),
    "transformer": Model(_init_transformer, _transformer, lambda task, width: 4 * width * task.d),
}
