"""From a checkpoint's files into a model: this rank's part of every tensor, found by byte range."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.pretrained import names_in_model
from distill.trajectory.manifest import BadTrajectory
from distill.trajectory.tensors import INDEX, TensorInfo, read_header, view_of

SINGLE = "model.safetensors"
OwnPart = Callable[[Tensor], tuple[Tensor, tuple[int, ...], int]]


@dataclass(frozen=True)
class Slot:
    """A place for a tensor of the checkpoints.

    names: in the model, its own and those of what it is tied to. shape: of the whole tensor.
    part: what this rank holds of it, flat, overwritten in place. first: index of its first element in the whole.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    part: Tensor
    first: int


def slots_of(model: PreTrainedModel, own_part: OwnPart) -> list[Slot]:
    """A slot for every tensor that the model's checkpoints store; tied ones share one."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).extend([name, ties[name]] if name in ties else [name])
    return [
        Slot(tuple(names[key]), shape, part, first)
        for key, tensor in tensors.items()
        for part, shape, first in [own_part(tensor)]
    ]


def find_tensors(folder: Path) -> dict[str, tuple[Any, TensorInfo]]:
    """Name -> (bytes of its file, where it lies there) of all tensors that a Hugging Face folder's model has.

    Raises:
        BadTrajectory: a file that is no safetensors, or lacks a tensor that the index says it has.
    """
    if (folder / SINGLE).exists():
        return _tensors_in(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise BadTrajectory(f"{folder} has neither {SINGLE} nor {INDEX}")
    places = _weight_map(folder / INDEX)
    shards = {shard: _tensors_in(folder / shard) for shard in sorted(set(places.values()))}
    if missing := [name for name, shard in places.items() if name not in shards[shard]]:
        raise BadTrajectory(f"{folder}/{places[missing[0]]} lacks {missing[0]}, which {INDEX} says it has")
    return {name: shards[shard][name] for name, shard in places.items()}


def _weight_map(path: Path) -> dict[str, str]:
    """{tensor: file beside the index}. A file that lies elsewhere was verified by nobody."""
    try:
        places: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadTrajectory(f"{path} is no index of weights: {error!r}") from error
    if others := [shard for shard in places.values() if Path(shard).name != shard]:
        raise BadTrajectory(f"{path} names {others[0]!r}, which does not lie beside it")
    return places


def _tensors_in(path: Path) -> dict[str, tuple[Any, TensorInfo]]:
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = read_header(lambda start, stop: buffer[start:stop], len(buffer))
    except ValueError as error:  # also of an empty file
        raise BadTrajectory(f"{path}: {error}") from error
    return {name: (buffer, info) for name, info in tensors.items()}


class Staged:
    """A copy of this rank's part of a checkpoint, in the model's dtypes, ready to be put in its place.

    Its memory, pinned for a GPU, is allocated once: fresh memory would cost more than the copy.
    """

    def __init__(self, model: PreTrainedModel, own_part: OwnPart) -> None:
        """own_part: tensor -> (this rank's part of it, flat; shape of the whole; index of the part's first element)."""
        self.model, self.slots = model, slots_of(model, own_part)
        self._copies = [
            torch.zeros(s.part.shape, dtype=s.part.dtype, pin_memory=s.part.is_cuda) for s in self.slots
        ]

    @property
    def num_bytes(self) -> int:
        return sum(c.nbytes for c in self._copies)

    def read(self, folder: Path) -> None:
        """Copy from the files in `folder`; touches this rank's byte ranges of them alone.

        Raises:
            BadTrajectory: a tensor that is missing, has another shape, or a value that is not finite.
        """
        stored = find_tensors(folder)
        tensors = {new: stored[old] for old, new in names_in_model(self.model, stored).items()}
        for slot, copy in zip(self.slots, self._copies, strict=True):
            name = next((n for n in slot.names if n in tensors), None)
            if name is None:
                raise BadTrajectory(f"{folder} lacks the weights {slot.names[0]}")
            buffer, info = tensors[name]
            if info.shape != slot.shape:
                raise BadTrajectory(
                    f"{folder}: {name} is {list(info.shape)} in the weights and {list(slot.shape)} in the model"
                )
            last = min(slot.first + copy.numel(), info.numel)
            count = max(last - slot.first, 0)
            if count:
                copy[:count].copy_(view_of(buffer, info, slot.first, last))
                _refuse_not_finite(copy[:count], name, folder)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Overwrite the model's weights by the copy, in place."""
        for slot, copy in zip(self.slots, self._copies, strict=True):
            slot.part.copy_(copy)


def _refuse_not_finite(values: Tensor, name: str, folder: Path) -> None:
    if not values.is_floating_point():
        return
    low, high = values.aminmax()  # without a temporary; NaN comes through
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadTrajectory(f"{folder}: {name} holds values that are not finite; use another checkpoint")
