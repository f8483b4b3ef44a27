"""Models in Hugging Face folders: with their weights, without them, or with some of their layers."""

from __future__ import annotations

import copy
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights

from distill.models import ARCHITECTURES, ATTENTION, AUTO, check_positions


def load_model(task: str, folder: Path, dtype: torch.dtype, sequence_length: int) -> PreTrainedModel:
    """A model from a Hugging Face folder (safetensors, no remote code).

    Raises:
        ValueError: the folder's model can't do `task`, lacks weights or has them in other sizes than its config
            says, needs code of its own, or has too few positions.
    """
    try:
        loaded = AUTO[task].from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below with their sizes
            attn_implementation=ATTENTION,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} can't be loaded as a {task} model: {error}") from error
    model, report = loaded
    _check_task(task, model.config, folder)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder} lacks the weights {missing[:5]}: is it a {task} model?")
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ValueError(
            f"{folder}: {name} is {list(found)} in the weights and {list(expected)} by config.json "
            f"({len(mismatched)} weights differ so): they don't belong together"
        )
    check_positions(model.config, sequence_length, f"{folder}/config.json max_position_embeddings")
    return typing.cast(PreTrainedModel, model)


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


def empty_model(task: str, folder: Path, dtype: torch.dtype, sequence_length: int) -> PreTrainedModel:
    """The model of a Hugging Face folder without its weights: what memory held there is what they are.

    Raises:
        ValueError: the folder's config can't be read, can't do `task`, needs code of its own, or has too few positions.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with no_init_weights():
            model = AUTO[task].from_config(
                config, dtype=dtype, trust_remote_code=False, attn_implementation=ATTENTION
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} can't be loaded as a {task} model: {error}") from error
    _check_task(task, model.config, folder)
    check_positions(model.config, sequence_length, f"{folder}/config.json max_position_embeddings")
    model.tie_weights()
    return typing.cast(PreTrainedModel, model)


def hidden_width(folder: Path) -> int:
    """Of the hidden states of a Hugging Face folder's model."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return int(config.hidden_size)


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint's files -> name in the model, as transformers maps those of other versions.

    Raises:
        ValueError: a weight that transformers would compute from those stored, so that it can't be read by itself.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    known = dict.fromkeys(model.state_dict(), True)
    names = {}
    for old in stored:
        names[old], converter = rename_source_key(old, renamings, converters, model.base_model_prefix, known)
        if converter is not None:
            raise ValueError(f"{model.config.model_type}: {old} is stored in another form than the model's")
    return names


def _check_task(task: str, config: PretrainedConfig, folder: Path) -> None:
    """transformers makes a causal model of a BERT, one that looks ahead."""
    others = [name for name, known in ARCHITECTURES.items() if config.model_type in known]
    if others and task not in others:
        raise ValueError(f"{folder} holds a {config.model_type}, a model for {others[0]}, not for {task}")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights in place, as `from_pretrained(dtype=...)` and DeepSpeed do.

    Module.to(dtype) would cast buffers too, and rotary frequencies in bf16 are other angles at far positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
