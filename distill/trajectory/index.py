"""Index a folder of checkpoints that came without a manifest, or that changed since it was written."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from data_prep.encoding import HUGGINGFACE_NAME, INFO_NAME
from data_prep.files import read_json, sha256_of
from data_prep.tokenizer_files import MODEL_NAME
from distill.trajectory.families import find_checkpoints
from distill.trajectory.manifest import (
    NAME,
    BadTrajectory,
    Checkpoint,
    Manifest,
    describe,
    read_manifest,
    refuse_duplicates,
)
from distill.trajectory.store import open_store

log = logging.getLogger(__name__)


def index_folder(folder: Path) -> Manifest:
    """Write the manifest of a folder of Hugging Face checkpoints, one sub-folder a step.

    Names of sub-folders: see families.py. What only the training run knew (tokens seen, validation losses, its
    tokenizer, that it has not ended) is carried over from the manifest there for checkpoints that are unchanged.

    Raises:
        BadTrajectory, ValueError: nothing recognised, mixed architectures, vocabularies or tokenizers,
            identical weights.
    """
    family, found = find_checkpoints(folder)
    before = _manifest_before(folder)
    checkpoints, unchanged = {}, False
    for step, path in sorted(found.items()):
        checkpoints[step], same = _carried_over(describe(path, path.name, step), before)
        unchanged = unchanged or same
    architecture, vocab_size = _kind(folder, found)
    tokenizer, complete = _tokenizer(folder, found), True
    if before and unchanged:
        tokenizer, complete = before.tokenizer_sha256 or tokenizer, before.complete
    manifest = Manifest(
        open_store(folder), family, architecture, vocab_size, tokenizer, complete, checkpoints=checkpoints
    )
    refuse_duplicates(manifest)
    manifest.write()
    return manifest


def _manifest_before(folder: Path) -> Manifest | None:
    if not (folder / NAME).exists():
        return None
    try:
        return read_manifest(folder)
    except BadTrajectory as error:
        log.warning("%s; what it told of tokens and validation losses is lost", error)
        return None


def _carried_over(checkpoint: Checkpoint, before: Manifest | None) -> tuple[Checkpoint, bool]:
    """(the checkpoint with what the manifest before told of it, whether its files are still the same)."""
    known = before.checkpoints.get(checkpoint.step) if before else None
    if known is None or known.files != checkpoint.files:
        return checkpoint, False
    told = dataclasses.replace(checkpoint, tokens=known.tokens, validation_loss=known.validation_loss)
    return told, True


def _kind(folder: Path, found: dict[int, Path]) -> tuple[str, int]:
    """(architecture, columns of the logits) of all checkpoints."""
    configs = [read_json(path / "config.json") for path in found.values()]
    kinds = {(c.get("model_type", "?"), c.get("vocab_size", 0)) for c in configs}
    if len(kinds) != 1:
        raise BadTrajectory(
            f"{folder}: the checkpoints are of several kinds (architecture, vocabulary): {sorted(kinds)}"
        )
    return kinds.pop()


def _tokenizer(folder: Path, found: dict[int, Path]) -> str | None:
    """Identity of the one tokenizer that lies in the checkpoints; None if none lies there."""
    identities = {step: tokenizer_identity(path) for step, path in sorted(found.items())}
    known = {sha: step for step, sha in identities.items() if sha}
    if len(known) > 1:
        examples = ", ".join(f"{sha[:12]} at step {step}" for sha, step in known.items())
        raise BadTrajectory(
            f"{folder}: the checkpoints were trained with several tokenizers ({examples}): "
            "move those of another run away"
        )
    return next(iter(known), None)


def tokenizer_identity(folder: Path) -> str | None:
    """sha256 by which `python -m data_prep tokenizer --from FOLDER` would know the tokenizer, None without one.

    That is of tokenizer.json where it came with the model, else of the SentencePiece model.
    """
    info = folder / INFO_NAME
    ours = info.is_file() and read_json(info)["kind"] == "sentencepiece"
    names = (MODEL_NAME, HUGGINGFACE_NAME) if ours else (HUGGINGFACE_NAME, MODEL_NAME)
    return next((sha256_of(folder / name) for name in names if (folder / name).is_file()), None)
