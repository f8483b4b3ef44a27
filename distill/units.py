"""Where a model has units that it can do without, gates on them, and the same model cut to those that are left.

A unit is an inner unit of a layer's feed-forward part, or the attention heads that share a key and value head. Closed
gates leave all weights their size, so that ZeRO and checkpoints see nothing of them; those behind get no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from distill.pretrained import cast_parameters


class Place(NamedTuple):
    """Where a layer has units of a kind: outputs of the projections `made`, inputs of the projection `read`.

    blocks: in how many blocks, each of all units, the outputs of one of `made` lie.
    """

    read: str
    made: tuple[str, ...]
    blocks: int = 1


# Kind of unit -> model type -> where it is. Heads are in no other model: their number decides their size there.
PLACES: dict[str, dict[str, Place]] = {
    "ffn": {
        "bert": Place("output.dense", ("intermediate.dense",)),
        "modernbert": Place("mlp.Wo", ("mlp.Wi",), blocks=2),
        "gpt2": Place("mlp.c_proj", ("mlp.c_fc",)),
        "gpt_neox": Place("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),
        "llama": Place("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")),
    },
    "heads": {
        "llama": Place("self_attn.o_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    },
}


class Units:
    """All units of one kind, U in each of L layers, and their gates: 1, or 0 where a unit is closed.

    As many are open in every layer, `left`, since a config has one number. counts: those that it can have, rising.
    """

    def __init__(self, model: PreTrainedModel, kind: str) -> None:
        """Put gates into the forward pass of `model`. Raises ValueError if it has no units of this kind to close."""
        model_type = model.config.model_type
        if model_type not in PLACES[kind]:
            raise ValueError(
                f"model.prune_to.{kind} is not for {model_type}, only for {', '.join(PLACES[kind])}: leave it out"
            )
        self.kind, self._place = kind, PLACES[kind][model_type]
        modules, read = dict(model.named_modules()), f".{self._place.read}"
        self._layers = [  # not the same name further inside a layer
            layer for n in modules if n.endswith(read) and (layer := n.removesuffix(read))[-1].isdigit()
        ]
        readers = [modules[layer + read] for layer in self._layers]
        self._transposed = isinstance(readers[0], Conv1D)  # weights [inputs, outputs]
        width = readers[0].weight.shape[0 if self._transposed else 1]
        self.number = self.left = model.config.num_key_value_heads if kind == "heads" else width
        self.counts = _sayable(model.config, kind, self.number)
        self._gates = [torch.ones(self.number, device=model.device, requires_grad=True) for _ in readers]
        for reader, gate in zip(readers, self._gates, strict=True):
            reader.register_forward_pre_hook(_gated(gate, width // self.number))

    @property
    def gates_LU(self) -> Tensor:
        """A copy, fp32."""
        return torch.stack(self._gates).detach()

    def take_gradient(self) -> Tensor:
        """Gradient of the gates [L, U], summed since it was taken last. RuntimeError if there was no backward."""
        gradients = [gate.grad for gate in self._gates if gate.grad is not None]
        for gate in self._gates:
            gate.grad = None
        return torch.stack(gradients)

    @torch.no_grad()
    def set(self, gates_LU: Tensor) -> None:
        """Give the gates these values, 1 or 0, as many of them 1 in every layer."""
        self.left = int(gates_LU[0].sum())
        for gate, values in zip(self._gates, gates_LU, strict=True):
            gate.copy_(values)

    def cut(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of `weights` that lie around the units, without what belongs to closed ones."""
        kept = {}
        outputs, inputs = (1, 0) if self._transposed else (0, 1)
        for layer, gate in zip(self._layers, self._gates, strict=True):
            is_open = gate.detach() == 1
            read = f"{layer}.{self._place.read}.weight"
            kept[read] = _keep(weights[read], inputs, is_open)
            for name in (f"{layer}.{made}" for made in self._place.made):
                kept[f"{name}.weight"] = _keep(
                    weights[f"{name}.weight"], outputs, is_open, self._place.blocks
                )
                if (bias := f"{name}.bias") in weights:
                    kept[bias] = _keep(weights[bias], 0, is_open, self._place.blocks)
        return kept


def without_closed(
    model: PreTrainedModel, weights: dict[str, Tensor], kinds: Iterable[Units]
) -> PreTrainedModel:
    """A smaller model that says what `model` says. weights: state dict of `model`, whole."""
    config, weights = copy.deepcopy(model.config), dict(weights)
    for units in kinds:
        _set_number(config, units.kind, units.left)
        weights |= units.cut(weights)
    with no_init_weights():
        smaller = type(model)(config)
    cast_parameters(smaller, model.dtype)
    smaller.tie_weights()
    smaller.load_state_dict(weights)
    if model.can_generate():
        smaller.generation_config = model.generation_config
    return smaller


def _gated(gate_U: Tensor, repeats: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook that multiplies what a projection reads, `repeats` numbers a unit, by the gates."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        return (hidden * gate_U.to(hidden.dtype).repeat_interleave(repeats), *others)

    return hook


def _keep(tensor: Tensor, axis: int, is_open_U: Tensor, blocks: int = 1) -> Tensor:
    by_unit = tensor.unflatten(axis, (blocks, len(is_open_U), -1))
    opened = is_open_U.nonzero().flatten().to(tensor.device)
    return by_unit.index_select(axis + 1, opened).flatten(axis, axis + 2)


def _sayable(config: PretrainedConfig, kind: str, number: int) -> list[int]:
    """How many units a config can have, up to `number`: heads must divide hidden_size, though they needn't fill it."""
    if kind != "heads":
        return list(range(1, number + 1))
    shared = config.num_attention_heads // number
    return [n for n in range(1, number + 1) if config.hidden_size % (n * shared) == 0]


def _set_number(config: PretrainedConfig, kind: str, number: int) -> None:
    if kind == "heads":
        shared = config.num_attention_heads // config.num_key_value_heads
        config.num_key_value_heads, config.num_attention_heads = number, number * shared
    elif config.model_type == "gpt2":
        config.n_inner = number
    else:
        config.intermediate_size = number
