"""A trajectory, or some of its steps, fetched into a folder; pickled weights become safetensors on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_prep.files import sha256_of
from data_prep.progress import Advance, progress
from distill.files import write_text
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, load_manifest
from distill.trajectory.store import Store, open_store

log = logging.getLogger(__name__)
BLOCK_BYTES = 256 << 20
CONVERTED = "model.safetensors"
SOURCE = ".source"  # beside what was converted: {name: [bytes, sha256]} of what was fetched


def pull(manifest: Manifest, folder: Path, steps: Iterable[int] | None = None) -> Manifest:
    """Fetch these steps, all by default, into `folder`/step_N, verified against the manifest; its own manifest grows
    with each, and is complete at last if this one is. What is there already, whole and as the source has it, is not
    fetched again. Returns the manifest in `folder`.

    Raises:
        BadTrajectory: no such step, or a file whose hash is not the manifest's.
        StoreError, OSError: what storage or the disk could not do; the same command goes on.
    """
    wanted = sorted(manifest.checkpoints if steps is None else set(steps))
    if unknown := [step for step in wanted if step not in manifest.checkpoints]:
        raise BadTrajectory(f"{manifest.url} has no steps {unknown}; it has {list(manifest.checkpoints)}")
    folder.mkdir(parents=True, exist_ok=True)
    local = _begun(manifest, folder)
    with progress(f"pull {manifest.url}", sum(manifest.checkpoints[s].num_bytes for s in wanted)) as advance:
        for step in wanted:
            checkpoint, target = manifest.checkpoints[step], folder / f"step_{step:08d}"
            known = local.checkpoints.get(step)
            if known and _is_whole(known, target) and _is_of(_fetched(known, target), checkpoint.files):
                advance(checkpoint.num_bytes)
                continue
            target.mkdir(exist_ok=True)
            (target / SOURCE).unlink(missing_ok=True)
            store, files = manifest.files_of(step), {}
            for name, (size, sha) in checkpoint.files.items():
                found = _fetch(store, name, target / name, size, sha, advance)
                files[name] = [size, found]
            new = _converted(dataclasses.replace(checkpoint, location=target.name, files=files), target)
            local.add(new)
            if new.files != files:
                write_text(target / SOURCE, json.dumps(files))
            for name in (known.files if known else {}).keys() - new.files.keys():
                (target / name).unlink(missing_ok=True)
    if local.complete != manifest.complete:
        local.complete = manifest.complete
        local.write()
    return local


def _begun(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest of what an earlier call has fetched, or an empty one; not complete before all has been fetched."""
    fresh = dataclasses.replace(manifest, store=open_store(folder), complete=False, checkpoints={})
    try:
        known = load_manifest(folder)
    except BadTrajectory:
        return fresh
    if dataclasses.replace(known, complete=False, checkpoints={}) != fresh:
        raise BadTrajectory(f"{folder} holds another trajectory ({known.family}): choose another folder")
    return known


def _is_whole(checkpoint: Checkpoint, folder: Path) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, (size, _) in checkpoint.files.items()
    )


def _fetched(known: Checkpoint, folder: Path) -> dict[str, Any]:
    """The files from which a checkpoint here was made, as they were at the source."""
    try:
        return dict(json.loads((folder / SOURCE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return known.files
    except (ValueError, TypeError) as error:
        log.warning("%s can't be read (%s): its step is fetched again", folder / SOURCE, error)
        return {}


def _is_of(fetched: dict[str, Any], files: dict[str, Any]) -> bool:
    """Whether the source still has what was fetched: its sizes, and its hashes where it tells them."""
    return fetched.keys() == files.keys() and all(
        fetched[name][0] == size and sha in (None, fetched[name][1]) for name, (size, sha) in files.items()
    )


def _fetch(store: Store, name: str, path: Path, size: int, sha: str | None, advance: Advance) -> str:
    """Write a file under a temporary name, verify it, rename it. Returns its sha256."""
    if sha and path.is_file() and path.stat().st_size == size and sha256_of(path) == sha:
        advance(size)
        return sha
    temporary, digest = path.with_name(f".{name}.{os.getpid()}.tmp"), hashlib.sha256()
    try:
        with open(temporary, "w+b") as file:
            etag = store.head(name).etag
            file.truncate(size)
            for start in range(0, size, BLOCK_BYTES):
                length = min(BLOCK_BYTES, size - start)
                with mmap.mmap(file.fileno(), length, offset=start) as block:
                    view = memoryview(block)
                    store.read_into(name, view, start, etag=etag)
                    digest.update(view)
                    view.release()
                advance(length)
            os.fsync(file.fileno())
        found = digest.hexdigest()
        if sha is not None and found != sha:
            raise BadTrajectory(
                f"{store.url}/{name} has sha256 {found[:12]}, the manifest says {sha[:12]}: it is damaged in storage, or "
                "was replaced; index the trajectory again or leave this step out"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _converted(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with its pickled weights as one safetensors file; read with nothing but tensors allowed."""
    pickled = [name for name in checkpoint.shards if name.endswith(".bin")]
    if not pickled:
        return checkpoint
    weights: dict[str, torch.Tensor] = {}
    for name in pickled:
        try:
            loaded = torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle's and torch's errors have no common kind
            raise BadTrajectory(
                f"{folder / name} is no plain file of tensors ({error}): leave this step out"
            ) from None
        weights |= _tensors(loaded, folder / name)
    # Tied weights are stored once by either format's own rules: here each has its copy, which loading ties again.
    own = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    save_file(own, folder / CONVERTED, {"format": "pt"})
    files = {name: entry for name, entry in checkpoint.files.items() if ".bin" not in name}
    files[CONVERTED] = [(folder / CONVERTED).stat().st_size, sha256_of(folder / CONVERTED)]
    for name in pickled:
        (folder / name).unlink()
    return dataclasses.replace(checkpoint, files=files)


def _tensors(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, Mapping) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise BadTrajectory(f"{path} holds something else than tensors by name: leave this step out")
    return dict(loaded)
