"""Make the manifest of checkpoints that came without one, or that changed since it was written."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from data_prep.progress import Advance, progress
from distill.trajectory.audit.listing import faults_of_listing
from distill.trajectory.disk import Disk
from distill.trajectory.facts import describe_common
from distill.trajectory.families import read_names
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, is_part, load_manifest
from distill.trajectory.sources import find_folders
from distill.trajectory.storage import Folder
from distill.trajectory.store import Store, open_store

log = logging.getLogger(__name__)
DIGEST = re.compile(
    r'"?([0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64})"?'
)  # other etags tell versions apart, not contents
BIN = re.compile(r"pytorch_model.*\.bin")
HASHED_AT_ONCE = 64 << 20  # bytes


def index_trajectory(
    source: str | Path,
    out: str | Path | None = None,
    *,
    pattern: str | None = None,
    stage: str | None = None,
    full: bool = False,
    steps: Collection[int] | None = None,
    allow_bin: bool = False,
) -> Manifest:
    """Write the manifest of all checkpoints at `source`, beside them or at `out`.

    Names: see families.py. Small files are hashed; weights in a local folder too, and elsewhere with `full`, those of
    `steps` or of all. What
    only the training run knew (tokens seen, losses, that it has not ended) is carried over from a manifest that is
    there for checkpoints that are unchanged. Faults that show are warned of; `distill trajectory audit` looks closer.

    Raises:
        ValueError: no checkpoints, of several families or stages, or names of one step.
        BadTrajectory: checkpoints with pickled weights alone, unless `allow_bin`; no config.json anywhere.
        StoreError: what storage could not do.
    """
    source = str(source)
    if source.startswith("hf://") and out is None:
        raise ValueError(f"{source} can't be written: give --out FOLDER for its manifest")
    home = open_store(source if out is None else out)
    folders = {folder.name: folder for folder in find_folders(source)}
    family, named = read_names(folders, source, pattern, stage)
    chosen = {step: folders[name.name] for step, name in named.items()}
    manifest = Manifest(home, family, "", 0, complete=True)
    for step, folder in chosen.items():
        location = folder.location if out is None else _address(source, folder.location)
        manifest.checkpoints[step] = Checkpoint(step, location, folder.files, named[step].tokens)
    _choose_files(manifest, source, allow_bin)
    if unknown := sorted(set(steps or []) - set(chosen)):
        raise ValueError(f"{source} has no steps {unknown}; it has {list(chosen)}")
    texts = _hash_files(manifest, chosen, set(chosen if steps is None else steps) if full else set())
    describe_common(manifest, texts)
    _carry_over(manifest)
    for step, faults in faults_of_listing(manifest).items():
        log.warning("step %d: %s", step, "; ".join(fault.sentence for fault in faults))
    manifest.write()
    return manifest


def _address(source: str, location: str) -> str:
    """A location for a manifest that lies elsewhere."""
    if "://" in location:
        return location
    base = source if "://" in source else Path(source).resolve().as_uri()
    return f"{base.rstrip('/')}/{location}"


def _choose_files(manifest: Manifest, source: str, allow_bin: bool) -> None:
    """Leave the files that make the checkpoints; pickled weights only where there are no others."""
    pickled = []
    for step, checkpoint in manifest.checkpoints.items():
        files = {name: entry for name, entry in sorted(checkpoint.files.items()) if is_part(name)}
        if not any(name.endswith(".safetensors") for name in files):
            bins = {name: entry for name, entry in checkpoint.files.items() if BIN.fullmatch(name)}
            pickled += [step] if bins else []
            files |= bins
        manifest.checkpoints[step] = dataclasses.replace(checkpoint, files=files)
    if pickled and not allow_bin:
        raise BadTrajectory(
            f"{source}: steps {pickled[:8]}{'...' if len(pickled) > 8 else ''} have only pickled weights (.bin), which may "
            "run code when they are read carelessly: --allow-bin takes them, `distill trajectory pull` converts them"
        )


# ------------------------------------------------------------------------------------------------ hashes


def _hash_files(manifest: Manifest, folders: Mapping[int, Folder], whole: set[int]) -> dict[str, bytes]:
    """Fill in sha256 where it is affordable. Returns {sha256: content} of the small files.

    whole: steps whose weights are read wherever they lie. A file that has the size and, where the etag is one, the digest
    of one read before is not read again: 154 steps mostly share a tokenizer.
    """
    known: dict[tuple[int, str], str] = {}
    texts: dict[str, bytes] = {}
    total = sum(c.num_bytes for c in manifest.checkpoints.values())
    with progress(f"index {manifest.url}", total) as advance:
        for step, checkpoint in manifest.checkpoints.items():
            store = manifest.files_of(step)
            for name, entry in checkpoint.files.items():
                etag = folders[step].etags.get(name) or ""
                key = (entry[0], etag if DIGEST.fullmatch(etag) else f"{step}/{name}")
                small = name not in checkpoint.shards
                if key in known:
                    entry[1] = known[key]
                elif small:
                    content = store.read(name)
                    known[key] = entry[1] = hashlib.sha256(content).hexdigest()
                    texts[entry[1]] = content
                elif entry[1] is None and (step in whole or isinstance(store, Disk)):
                    entry[1] = sha256_in(store, name, entry[0], advance)
                    continue
                advance(entry[0])
    return texts


def sha256_in(store: Store, name: str, size: int, advance: Advance) -> str:
    """Of a file in a store, read in blocks."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, HASHED_AT_ONCE)))
    for start in range(0, size, HASHED_AT_ONCE):
        view = buffer[: min(HASHED_AT_ONCE, size - start)]
        store.read_into(name, view, start)
        digest.update(view)
        advance(len(view))
    return digest.hexdigest()


def _carry_over(manifest: Manifest) -> None:
    """What a manifest that is already there told of checkpoints that are still the same."""
    try:
        before = load_manifest(manifest.store)
    except BadTrajectory as error:
        if "does not exist" not in str(error):
            log.warning("%s; what it told of tokens and validation losses is lost", error)
        return
    same = {s for s, c in manifest.checkpoints.items() if _same(c, before.checkpoints.get(s))}
    for step in same:
        known, now = before.checkpoints[step], manifest.checkpoints[step]
        manifest.checkpoints[step] = dataclasses.replace(
            now,
            files={name: [size, sha or known.files[name][1]] for name, (size, sha) in now.files.items()},
            tokens=known.tokens,
            validation_loss=known.validation_loss,
            probes=known.probes,
        )
    if same:
        manifest.tokenizer_sha256 = before.tokenizer_sha256 or manifest.tokenizer_sha256
        manifest.complete = before.complete


def _same(now: Checkpoint, before: Checkpoint | None) -> bool:
    """Whether all that is known of the files agrees: sizes, and the hashes that both have.

    Should other weights of that size lie there, their hash refuses them when they are fetched.
    """
    if before is None or now.files.keys() != before.files.keys():
        return False
    pairs = [(entry, before.files[name]) for name, entry in now.files.items()]
    return all(a[0] == b[0] and (a[1] == b[1] or None in (a[1], b[1])) for a, b in pairs)
