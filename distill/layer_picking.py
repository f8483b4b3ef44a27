"""A smaller model made of layers of a larger one."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from distill.models import ATTENTION, AUTO


def pick_layers(task: str, model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of these layers of `model`, from 0, in this order, with the same embeddings and head (DistilBERT, 2019).

    Raises:
        ValueError: a layer that is not there, or that can't stand where it was put, as its weights are of other kinds.
    """
    there = range(model.config.num_hidden_layers)
    if not layers or any(i not in there for i in layers) or len(set(layers)) < len(layers):
        raise ValueError(
            f"model.init_layers must name different layers of 0 to {there[-1]}, got {list(layers)}"
        )
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == len(there)]
    if len(stacks) != 1:
        raise ValueError(
            f"{model.config.model_type} has no single stack of layers: leave out model.init_layers"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[i] for i in layers]
    place = re.compile(rf"{re.escape(stacks[0])}\.(\d+)\.")
    state = {}
    for name, tensor in model.state_dict().items():
        if not (found := place.match(name)):
            state[name] = tensor
        elif int(found[1]) in layers:
            state[f"{stacks[0]}.{layers.index(int(found[1]))}.{name[found.end() :]}"] = tensor
    picked = AUTO[task].from_config(config, dtype=model.dtype, attn_implementation=ATTENTION)
    try:
        picked.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"model.init_layers={list(layers)}: these layers of {config.model_type} can't stand in this order: {error}"
        ) from error
    return typing.cast(PreTrainedModel, picked)
