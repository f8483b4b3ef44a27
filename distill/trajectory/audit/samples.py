"""A few numbers of a few tensors of every checkpoint: enough to know weights again, and to see where they jump."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.progress import progress
from distill.trajectory.audit.headers import Headers, Layout
from distill.trajectory.audit.listing import Finding
from distill.trajectory.manifest import Manifest
from distill.trajectory.storage import GONE, StoreError
from distill.trajectory.tensors import TensorInfo, view_of

NUM_TENSORS, NUM_VALUES = 32, 2048  # sampled of a checkpoint, of a tensor
STEPS_AT_ONCE = 4


@dataclass
class Samples:
    """Numbers of a checkpoint by tensor: fp32 [N], and a digest of their bytes as stored."""

    values: dict[str, Tensor]
    digests: dict[str, str]


def choose_tensors(layout: Mapping[str, Layout]) -> list[str]:
    """Floating-point tensors spread over the model, matrices before vectors."""
    floats = sorted(
        name for name, (shape, dtype) in layout.items() if dtype.is_floating_point and 0 not in shape
    )
    wide = [name for name in floats if len(layout[name][0]) > 1] or floats
    count = min(NUM_TENSORS, len(wide))
    return [wide[i * len(wide) // count] for i in range(count)]


def read_samples(manifest: Manifest, headers: Mapping[int, Headers], names: list[str]) -> dict[int, Samples]:
    """The numbers in the middle of each of these tensors, of the checkpoints that have them; none of truncated files."""
    samples = {}
    steps = [step for step, found in headers.items() if found.shards]
    label = f"audit {manifest.url}"
    with progress(label, len(steps), "step") as advance, ThreadPoolExecutor(STEPS_AT_ONCE) as threads:
        found = threads.map(lambda step: _samples(manifest, step, headers[step], names), steps)
        for step in steps:
            samples[step] = next(found)
            advance(1)
    return samples


def _samples(manifest: Manifest, step: int, headers: Headers, names: list[str]) -> Samples:
    tensors = {name: (shard, info) for shard, held in headers.shards.items() for name, info in held.items()}
    wanted = [(name, *tensors[name]) for name in names if name in tensors]
    ranges = [(shard, *_middle(info)) for _, shard, info in wanted]
    found = Samples({}, {})
    try:
        pieces = manifest.files_of(step).read_many(ranges)
    except StoreError as error:
        if error.kind not in GONE:
            raise
        return found  # the sizes say so
    for (name, _, info), piece in zip(wanted, pieces, strict=True):
        flat = TensorInfo(info.dtype, (len(piece) // info.dtype.itemsize,), 0, len(piece))
        found.values[name] = view_of(bytearray(piece), flat).float()
        found.digests[name] = hashlib.sha256(piece).hexdigest()[:16]
    return found


def _middle(info: TensorInfo) -> tuple[int, int]:
    """(start, stop) in the file of up to NUM_VALUES values in the middle of a tensor."""
    count = min(NUM_VALUES, info.numel)
    start = info.start + (info.numel - count) // 2 * info.dtype.itemsize
    return start, start + count * info.dtype.itemsize


def faults_of_samples(samples: Mapping[int, Samples]) -> dict[int, list[Finding]]:
    """{step: values that are not finite}."""
    faults = {}
    for step, found in samples.items():
        spoilt = [name for name, values in found.values.items() if not torch.isfinite(values).all()]
        if spoilt:
            among = f"{len(spoilt)} of {len(found.values)} tensors looked at"
            faults[step] = [Finding("nonfinite", f"{spoilt[0]} holds values that are not finite ({among})")]
    return faults
