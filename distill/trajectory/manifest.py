"""manifest.json: the one description of a trajectory, kept beside it, checked before use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.files import sha256_of
from distill.trajectory.store import Store, StoreError, open_store

SCHEMA = 2
NAME = "manifest.json"
WEIGHTS = (".safetensors", ".bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt")


class BadTrajectory(ValueError):
    """A checkpoint or manifest from which nobody should learn."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: where its files lie, and each {name: [bytes, sha256]}.

    location: path relative to the manifest, or a URL such as hf://owner/name@revision.
    sha256 is None where the source doesn't tell and nobody has read the file yet: weights, from which nobody learns then.
    tokens: seen in training so far; validation_loss: nats a counted token; None where the source doesn't tell.
    probes: other measurements by name.
    """

    step: int
    location: str
    files: dict[str, list[Any]]
    tokens: int | None = None
    validation_loss: float | None = None
    probes: dict[str, float] = field(default_factory=dict)

    @property
    def shards(self) -> list[str]:
        """Names of the files that hold weights."""
        return sorted(name for name in self.files if name.endswith(WEIGHTS))

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def weights(self) -> tuple[str, ...]:
        """sha256 of the weight files, in the order of their names; `? N bytes` for those not read yet."""
        return tuple(sha or f"? {size} bytes" for size, sha in (self.files[name] for name in self.shards))

    @property
    def tokenizer(self) -> tuple[tuple[str, str], ...]:
        """(name, sha256) of the tokenizer's files; empty if the checkpoint came without."""
        return tuple((name, self.files[name][1]) for name in TOKENIZER if name in self.files)

    @property
    def is_hashed(self) -> bool:
        """Whether the sha256 of every file is known."""
        return all(sha for _, sha in self.files.values())


@dataclass
class Manifest:
    """A trajectory: checkpoints by step, and what they have in common.

    vocab_size: columns of the logits, padding included; real_vocab_size: tokens of the tokenizer. dtype: of the
    weights as stored, e.g. F16. tied: input and output embeddings are one. None where the source doesn't tell.
    complete: the run that leaves it has ended.
    """

    store: Store = field(compare=False)
    family: str
    architecture: str
    vocab_size: int
    tokenizer_sha256: str | None = None
    complete: bool = False
    real_vocab_size: int | None = None
    tied: bool | None = None
    dtype: str | None = None
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    _opened: dict[str, Store] = field(default_factory=dict, compare=False, repr=False)

    @property
    def url(self) -> str:
        """Where it lies; free of credentials."""
        return self.store.url

    @property
    def losses(self) -> dict[int, float]:
        return {s: c.validation_loss for s, c in self.checkpoints.items() if c.validation_loss is not None}

    def files_of(self, step: int) -> Store:
        """The store in which the files of this checkpoint lie by their names."""
        location = self.checkpoints[step].location
        if "://" not in location:
            return self.store.under(location)
        if location not in self._opened:  # with its connections
            self._opened[location] = open_store(location)
            self._opened[location].traffic = self.store.traffic  # counted together
        return self._opened[location]

    def add(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint whose files are in place, and write the manifest."""
        self.checkpoints[checkpoint.step] = checkpoint
        self.checkpoints = dict(sorted(self.checkpoints.items()))
        self.write()

    def write(self) -> None:
        """Store it beside the checkpoints, whole or not at all."""
        self.store.write(NAME, self.to_json().encode())

    def to_json(self) -> str:
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        told["checkpoints"] = [dataclasses.asdict(c) for c in self.checkpoints.values()]
        return json.dumps({"schema": SCHEMA, **told}, indent=1)


def load_manifest(where: str | Path | Store) -> Manifest:
    """The manifest at a folder, a URL or a store. Whether its checkpoints are good, the audit tells.

    Raises:
        BadTrajectory: no or unreadable manifest, or another schema.
        StoreError: the storage can't be reached, refuses the credentials, or has no such bucket.
    """
    store = open_store(where) if isinstance(where, str | Path) else where
    name, command = f"{store.url}/{NAME}", f"`distill trajectory index {store.url}`"
    try:
        content = json.loads(store.read(NAME))
        if content.pop("schema") != SCHEMA:
            raise BadTrajectory(f"{name} has another schema than {SCHEMA}: run {command} again")
        checkpoints = {c["step"]: _checkpoint(c) for c in content.pop("checkpoints")}
        return Manifest(store, **content, checkpoints=dict(sorted(checkpoints.items())))
    except StoreError as error:
        if error.kind != "missing":
            raise
        raise BadTrajectory(
            f"{name} does not exist: for checkpoints without a manifest run {command} first"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BadTrajectory):
            raise
        raise BadTrajectory(f"{name} is no manifest ({error!r}): run {command} again") from error


def _checkpoint(content: dict[str, Any]) -> Checkpoint:
    """One entry. A manifest may come from elsewhere: no path in it may lead out of its place."""
    checkpoint = Checkpoint(**content)
    for path in [checkpoint.location, *checkpoint.files]:
        if ".." in PurePosixPath(path).parts or path.startswith("/"):
            raise ValueError(f"path {path!r} leads out of the trajectory")
    return checkpoint


def refuse_without_hashes(manifest: Manifest, steps: Iterable[int]) -> None:
    """Raises BadTrajectory for steps of which nothing would tell whether other bytes came than were meant."""
    if without := sorted(
        s for s in set(steps) & manifest.checkpoints.keys() if not manifest.checkpoints[s].is_hashed
    ):
        numbers = ",".join(map(str, without))
        raise BadTrajectory(
            f"{manifest.url} has no sha256 of the weights of teacher steps {without}, so nothing would tell them from others: "
            f"`distill trajectory index {manifest.url} --full --steps {numbers}` reads and hashes them"
        )


def verify(manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> None:
    """Check every file of a checkpoint that lies in `folder` against the manifest, by size and sha256.

    Raises:
        BadTrajectory: naming the step, the file, what was found and what to do.
    """
    for name, (size, sha) in checkpoint.files.items():
        path = folder / name
        found_size = path.stat().st_size if path.exists() else None
        if found_size != size:
            found = "is missing" if found_size is None else f"has {found_size} bytes"
            raise BadTrajectory(
                f"teacher step {checkpoint.step}: {path} {found}, the manifest says {size} bytes: fetch it again"
            )
        if sha is not None and (found_sha := sha256_of(path)) != sha:
            raise BadTrajectory(
                f"teacher step {checkpoint.step}: {path} has sha256 {found_sha[:12]}, "
                f"the manifest says {sha[:12]}: fetch it again"
            )


def describe(
    folder: Path, location: str, step: int, tokens: int | None = None, loss: float | None = None
) -> Checkpoint:
    """A checkpoint's entry, from the files that lie in `folder`.

    Raises:
        BadTrajectory: no safetensors or no config.json.
    """
    files = {p.name: [p.stat().st_size, sha256_of(p)] for p in sorted(folder.iterdir()) if is_part(p.name)}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise BadTrajectory(f"{folder} needs config.json and *.safetensors, got {sorted(files)}")
    return Checkpoint(step, location, files, tokens, loss)


def is_part(name: str) -> bool:
    """Whether a file belongs to a checkpoint: weights, configuration and tokenizer; no pickle, no optimizer."""
    return name.endswith((".safetensors", ".json")) or name in TOKENIZER
