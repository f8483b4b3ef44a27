"""What the ranks of any ZeRO layout saved, as whole tensors: a parameter's weights and AdamW's two moments.

The layouts are DeepSpeed 0.19.8's own (runtime/zero). Its files are mapped into memory, so that one parameter at a time
is read and made whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEYS = ("weights", "exp_avg", "exp_avg_sq")
Parts = list[Tensor]  # flat, one a key


class ZeroFiles:
    """The parameters that are stored in one folder of DeepSpeed's files.

    step: AdamW's count of steps, the same for all parameters.
    """

    def __init__(self, folder: Path, stage: int, ranks: int, names: Sequence[str]) -> None:
        """names: of the parameters, in the order in which the optimizer counts them.

        Raises OSError, RuntimeError, KeyError, UnpicklingError where files are missing or of another layout.
        """
        self.folder = folder
        self._parts: dict[str, list[Parts]] = {}
        if stage == 0:
            content = _read(folder / "mp_rank_00_model_states.pt")
            self._add(_in_stage_0(content, names))
            states = content["optimizer"]["state"]
        else:
            shapes = _read(_of_rank(folder, 0, "model"))["param_shapes"] if stage == 3 else None
            for rank in range(ranks):
                optimizer = _read(_of_rank(folder, rank, "optim"))["optimizer_state_dict"]
                self._add(_in_stage_3(optimizer, shapes, ranks) if shapes else _in_stages_1_and_2(optimizer))
            states = _states(optimizer)
        self.step = float(states[0]["step"])

    def _add(self, found: Iterator[tuple[str, Parts]]) -> None:
        for name, parts in found:
            self._parts.setdefault(name, []).append(parts)

    def refuse_other(self, sizes: Mapping[str, int]) -> None:
        """Raises ValueError unless these parameters are there with so many numbers; padding may follow them."""
        for name, numel in sizes.items():
            found = sum(len(parts[0]) for parts in self._parts.get(name, []))
            if found != numel and not numel <= found < numel + len(self._parts[name]):
                raise ValueError(f"{self.folder} has {found} numbers of {name}, the model {numel}")

    def whole(self, name: str, numel: int) -> Parts:
        """The parameter's `KEYS`, each flat and of `numel` fp32 numbers."""
        return [torch.cat(of_ranks)[:numel] for of_ranks in zip(*self._parts[name], strict=True)]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content


def _of_rank(folder: Path, rank: int, kind: str) -> Path:
    """That rank's file; its name begins with the dtype in bf16."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
    return next((p for p in folder.glob(f"*{name}") if p.name in (name, f"bf16_{name}")), folder / name)


def _states(optimizer: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """AdamW's state by number of the flat tensor."""
    inner = optimizer.get("base_optimizer_state") or optimizer["optimizer_state_dict"]
    states: dict[int, dict[str, Tensor]] = inner["state"]
    return states


def _in_stage_0(content: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Parts]]:
    """Stage 0: everything whole, the moments by number."""
    for number, name in enumerate(names):
        state = content["optimizer"]["state"][number]
        tensors = (content["module"][name], state["exp_avg"], state["exp_avg_sq"])
        yield name, [tensor.flatten() for tensor in tensors]


def _in_stages_1_and_2(optimizer: dict[str, Any]) -> Iterator[tuple[str, Parts]]:
    """Stages 1 and 2: a group of parameters is one flat tensor, cut into a part a rank wherever that falls."""
    states = _states(optimizer)
    for number, places in enumerate(optimizer["param_slice_mappings"]):
        flats = (optimizer["single_partition_of_fp32_groups"][number], *_moments(states[number]))
        for name, place in places.items():
            yield name, [flat.narrow(0, place.start, place.numel) for flat in flats]


def _in_stage_3(
    optimizer: dict[str, Any], shapes: list[dict[str, torch.Size]], ranks: int
) -> Iterator[tuple[str, Parts]]:
    """Stage 3: each parameter is dealt over all ranks in equal parts, the last one padded; parts lie end to end.

    They fill one flat tensor after another, `sub_group_size` numbers each, which no part straddles.
    """
    states, weights = _states(optimizer), optimizer["fp32_flat_groups"]
    number, start = 0, 0
    for group in shapes:
        for name, shape in group.items():
            numel = -(-shape.numel() // ranks)
            if start == weights[number].numel():
                number, start = number + 1, 0
            flats = (weights[number], *_moments(states[number]))
            yield name, [flat.narrow(0, start, numel) for flat in flats]
            start += numel


def _moments(state: dict[str, Tensor]) -> list[Tensor]:
    return [state[key] for key in KEYS[1:]]
