"""manifest.json: the one description of a trajectory, written checkpoint by checkpoint, checked before use."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import sha256_of
from distill.files import write_text

SCHEMA = 1
NAME = "manifest.json"


class BadTrajectory(ValueError):
    """A checkpoint or manifest from which nobody should learn."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its folder, relative to the manifest, and files {name: [bytes, sha256]}.

    tokens: seen in training so far; validation_loss: nats a counted token; None where the source doesn't tell.
    """

    step: int
    folder: str
    files: dict[str, list[Any]]
    tokens: int | None = None
    validation_loss: float | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """sha256 of the weight files, in the order of their names."""
        return tuple(sha for name, (_, sha) in sorted(self.files.items()) if name.endswith(".safetensors"))


@dataclass
class Manifest:
    """A trajectory: checkpoints by step, and what they have in common.

    vocab_size: columns of the logits. tokenizer_sha256: None where the source doesn't tell. complete: the run
    that leaves it has ended.
    """

    root: Path
    family: str
    architecture: str
    vocab_size: int
    tokenizer_sha256: str | None = None
    complete: bool = False
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        return {s: c.validation_loss for s, c in self.checkpoints.items() if c.validation_loss is not None}

    def add(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint whose files are in place, and write the manifest."""
        self.checkpoints[checkpoint.step] = checkpoint
        self.checkpoints = dict(sorted(self.checkpoints.items()))
        self.write()

    def write(self) -> None:
        content = {
            **dataclasses.asdict(self),
            "schema": SCHEMA,
            "checkpoints": [dataclasses.asdict(c) for c in self.checkpoints.values()],
        }
        del content["root"]
        write_text(self.root / NAME, json.dumps(content, indent=1))


def load_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        BadTrajectory: no or unreadable manifest, another schema, or the same weights under two steps.
    """
    manifest = read_manifest(folder)
    refuse_duplicates(manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """`folder`/manifest.json as it stands. Raises BadTrajectory as `load_manifest`, but not for double weights."""
    path = folder / NAME
    if not path.exists():
        raise BadTrajectory(
            f"{path} does not exist: for a folder of checkpoints run `distill trajectory index {folder}` first"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise BadTrajectory(f"{path} has another schema than {SCHEMA}: index the trajectory again")
        checkpoints = {c["step"]: Checkpoint(**c) for c in content.pop("checkpoints")}
        return Manifest(root=folder, **content, checkpoints=checkpoints)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadTrajectory(
            f"{path} is no manifest ({error!r}): run `distill trajectory index {folder}` again"
        ) from error


def refuse_duplicates(manifest: Manifest) -> None:
    """Raises BadTrajectory where two steps hold the same weights: one of them is mislabelled."""
    seen: dict[tuple[str, ...], int] = {}
    for step, checkpoint in manifest.checkpoints.items():
        if (weights := checkpoint.weights) in seen:
            raise BadTrajectory(
                f"{manifest.root}: steps {seen[weights]} and {step} hold identical weights; one of them is mislabelled. "
                f"Remove the wrong folder and run `distill trajectory index` again"
            )
        seen[weights] = step


def verify(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Check every file of a checkpoint against the manifest, by size and sha256.

    Raises:
        BadTrajectory: naming the step, the file, what was found and what to do.
    """
    for name, (size, sha) in checkpoint.files.items():
        path = manifest.root / checkpoint.folder / name
        found_size = path.stat().st_size if path.exists() else None
        if found_size != size:
            found = "is missing" if found_size is None else f"has {found_size} bytes"
            raise BadTrajectory(
                f"teacher step {checkpoint.step}: {path} {found}, the manifest says {size} bytes: fetch it again"
            )
        if (found_sha := sha256_of(path)) != sha:
            raise BadTrajectory(
                f"teacher step {checkpoint.step}: {path} has sha256 {found_sha[:12]}, "
                f"the manifest says {sha[:12]}: fetch it again"
            )


def describe(
    root: Path, step: int, folder: Path, tokens: int | None = None, loss: float | None = None
) -> Checkpoint:
    """A checkpoint's entry, from the files that lie in its folder.

    Raises:
        BadTrajectory: no safetensors or no config.json.
    """
    files = {
        p.name: [p.stat().st_size, sha256_of(p)]
        for p in sorted(folder.iterdir())
        if p.suffix in (".safetensors", ".json")
    }
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise BadTrajectory(f"{folder} needs config.json and *.safetensors, got {sorted(files)}")
    return Checkpoint(step, str(folder.relative_to(root)), files, tokens, loss)
