"""What the headers of the weight files say: their ends, their tensors, and whether these are those of other steps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from distill.trajectory.audit.listing import Finding
from distill.trajectory.manifest import Checkpoint, Manifest
from distill.trajectory.store import Store, StoreError
from distill.trajectory.tensors import INDEX, BadTensors, TensorInfo, read_header

AT_ONCE = 8  # checkpoints
Layout = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Headers:
    """Tensors of a checkpoint by shard. faults: why some could not be read."""

    shards: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)

    @property
    def layout(self) -> dict[str, Layout]:
        """{tensor: (shape, dtype)} over all shards."""
        tensors = (item for shard in self.shards.values() for item in shard.items())
        return {name: (info.shape, info.dtype) for name, info in tensors}

    @property
    def shard_of(self) -> dict[str, str]:
        return {name: shard for shard, tensors in self.shards.items() for name in tensors}


def read_headers(manifest: Manifest) -> dict[int, Headers]:
    """The headers of every checkpoint's safetensors, by step."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        steps = manifest.checkpoints
        return dict(
            zip(steps, threads.map(lambda s: _headers(manifest.files_of(s), steps[s]), steps), strict=True)
        )


def _headers(store: Store, checkpoint: Checkpoint) -> Headers:
    found = Headers()
    for name in checkpoint.shards:
        if not name.endswith(".safetensors"):
            continue
        try:
            found.shards[name] = read_header(partial(store.read, name), checkpoint.files[name][0])
        except BadTensors as error:
            found.faults.append(Finding("truncated", f"{name}: {error}"))
        except StoreError as error:
            if error.kind not in ("missing", "short"):  # the storage's fault, not the checkpoint's
                raise
            found.faults.append(
                Finding("missing" if error.kind == "missing" else "truncated", f"{name} {error.sentence}")
            )
    found.faults += [Finding("index", sentence) for sentence in _against_index(store, checkpoint, found)]
    return found


def _against_index(store: Store, checkpoint: Checkpoint, headers: Headers) -> Iterator[str]:
    """Where model.safetensors.index.json and the shards disagree."""
    if INDEX not in checkpoint.files:
        if len(headers.shards) > 1:
            yield f"{INDEX} is missing, the weights are in {len(headers.shards)} files"
        return
    try:
        placed = dict(json.loads(store.read(INDEX))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"{INDEX} can't be read: {error!r}"
        return
    shard_of = headers.shard_of
    for shard in sorted(set(placed.values()) - set(checkpoint.files)):
        yield f"{shard} is missing, {INDEX} asks for it"
    read = {name: shard for name, shard in placed.items() if shard in headers.shards}
    wrong = sorted(name for name, shard in read.items() if shard_of.get(name) != shard)
    if wrong:
        where = shard_of.get(wrong[0], "in no shard")
        yield f"{INDEX} puts {wrong[0]} in {placed[wrong[0]]}, it is {where} ({len(wrong)} tensors disagree)"
    if extra := sorted(set(shard_of) - set(placed)):
        yield f"{INDEX} lacks {extra[0]} of {shard_of[extra[0]]} ({len(extra)} tensors)"


def faults_of_headers(headers: Mapping[int, Headers]) -> dict[int, list[Finding]]:
    """{step: faults}: unreadable shards, and tensors other than at most steps."""
    usual = usual_layout(headers)
    faults = {step: [*found.faults, *_unusual(found, usual)] for step, found in headers.items()}
    return {step: found for step, found in faults.items() if found}


def usual_layout(headers: Mapping[int, Headers]) -> dict[str, Layout]:
    """The layout that most readable checkpoints have."""
    counted = Counter(tuple(sorted(h.layout.items())) for h in headers.values() if h.shards and not h.faults)
    return dict(counted.most_common(1)[0][0]) if counted else {}


def _unusual(headers: Headers, usual: Mapping[str, Layout]) -> Iterator[Finding]:
    layout = headers.layout
    if not headers.shards or not usual:
        return
    if not headers.faults and (lacking := sorted(set(usual) - set(layout))):
        yield Finding("shape", f"{lacking[0]} is missing, most steps have it ({len(lacking)} tensors)")
    if extra := sorted(set(layout) - set(usual)):
        yield Finding("shape", f"{extra[0]} is at few other steps ({len(extra)} tensors)")
    both = sorted(set(layout) & set(usual))
    if shapes := [name for name in both if layout[name][0] != usual[name][0]]:
        one = shapes[0]
        said = f"{one} is {list(layout[one][0])}, at most steps {list(usual[one][0])} ({len(shapes)} tensors)"
        yield Finding("shape", said)
    if dtypes := [name for name in both if layout[name][1] != usual[name][1]]:
        one = dtypes[0]
        said = f"{one} is {layout[one][1]}, at most steps {usual[one][1]} ({len(dtypes)} tensors)"
        yield Finding("dtype", said.replace("torch.", ""))
