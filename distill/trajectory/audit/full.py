"""Every byte of every checkpoint: hashes against the manifest, and all values finite."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import torch

from data_prep.progress import Advance, progress
from distill.trajectory.audit.headers import Headers
from distill.trajectory.audit.listing import Finding
from distill.trajectory.manifest import Manifest
from distill.trajectory.storage import GONE, Store, StoreError
from distill.trajectory.tensors import TensorInfo, view_of

BLOCK_BYTES = 64 << 20


def faults_of_all_bytes(manifest: Manifest, headers: Mapping[int, Headers]) -> dict[int, list[Finding]]:
    """{step: faults} of shards whose header can be read."""
    faults: dict[int, list[Finding]] = defaultdict(list)
    todo = [(step, shard) for step, found in headers.items() for shard in found.shards]
    total = sum(manifest.checkpoints[step].files[shard][0] for step, shard in todo)
    with progress(f"audit {manifest.url}", total) as advance:
        for step, shard in todo:
            size, expected = manifest.checkpoints[step].files[shard]
            tensors = headers[step].shards[shard]
            try:
                found, spoilt = _read_shard(manifest.files_of(step), shard, size, tensors, advance)
            except StoreError as error:
                if error.kind not in GONE:
                    raise
                continue  # the sizes say so
            if expected is not None and found != expected:
                said = f"{shard} has sha256 {found[:12]}, the manifest says {expected[:12]}"
                faults[step].append(Finding("hash", said))
            if spoilt:
                said = (
                    f"{spoilt[0]} holds values that are not finite ({len(spoilt)} of {len(tensors)} tensors)"
                )
                faults[step].append(Finding("nonfinite", said))
    return dict(faults)


def _read_shard(
    store: Store, shard: str, size: int, tensors: Mapping[str, TensorInfo], advance: Advance
) -> tuple[str, list[str]]:
    """(sha256, names of tensors with values that are not finite)."""
    digest, spoilt = hashlib.sha256(), []
    in_order = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    digest.update(store.read(shard, 0, in_order[0][1].start if in_order else size))
    for name, info in in_order:  # they tile the file: the header was checked for that
        finite = True
        for start in range(info.start, info.stop, BLOCK_BYTES):
            block = bytearray(min(BLOCK_BYTES, info.stop - start))
            store.read_into(shard, memoryview(block), start)
            digest.update(block)
            advance(len(block))
            if info.dtype.is_floating_point:
                flat = TensorInfo(info.dtype, (len(block) // info.dtype.itemsize,), 0, len(block))
                finite = finite and bool(torch.isfinite(view_of(block, flat)).all())
        if not finite:
            spoilt.append(name)
    return digest.hexdigest(), spoilt
