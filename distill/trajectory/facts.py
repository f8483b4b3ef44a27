"""What the checkpoints of a trajectory have in common: architecture, vocabulary, tokenizer, dtype, ties."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from data_prep.encoding import HUGGINGFACE_NAME, INFO_NAME
from data_prep.tokenizer_files import MODEL_NAME, parse_model
from distill.trajectory.audit.listing import usual_tokenizer
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest
from distill.trajectory.tensors import BadTensors, TensorInfo, read_header

log = logging.getLogger(__name__)
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "decoder.weight")


def describe_common(manifest: Manifest, texts: Mapping[str, bytes]) -> None:
    """Fill in what most checkpoints say; those that say otherwise are warned of.

    texts: content by sha256 of the small files. Raises BadTrajectory if no checkpoint says what it is.
    """
    configs = {step: _json(c, "config.json", texts) for step, c in manifest.checkpoints.items()}
    kinds = {step: (c.get("model_type"), c.get("vocab_size", 0)) for step, c in configs.items()}
    usual, _ = Counter(kinds.values()).most_common(1)[0]
    if usual[0] is None:
        raise BadTrajectory(f"{manifest.url}: most checkpoints lack a config.json with a model_type")
    manifest.architecture, manifest.vocab_size = str(usual[0]), int(usual[1])
    for step, kind in kinds.items():
        if kind != usual:
            log.warning("step %d is of another kind (architecture, vocabulary) than most: %s", step, kind)
    tokenizer = usual_tokenizer(manifest)
    if first := next(
        (c for c in manifest.checkpoints.values() if c.tokenizer == tokenizer and tokenizer), None
    ):
        manifest.tokenizer_sha256 = tokenizer_identity(first, _json(first, INFO_NAME, texts))
        manifest.real_vocab_size = _num_tokens(first, texts)
    _describe_weights(manifest, configs[max(configs)])


def _json(checkpoint: Checkpoint, name: str, texts: Mapping[str, bytes]) -> dict[str, Any]:
    """Content of a small file, empty where there is none or where it is damaged."""
    try:
        return dict(json.loads(texts[checkpoint.files[name][1]]))
    except (KeyError, ValueError, TypeError):
        return {}


def _describe_weights(manifest: Manifest, config: Mapping[str, Any]) -> None:
    header = _some_header(manifest)
    numbers: Counter[str] = Counter()
    for tensor in header.values():
        numbers[str(tensor.dtype).removeprefix("torch.")] += tensor.numel
    manifest.dtype = numbers.most_common(1)[0][0] if numbers else None
    manifest.tied = config.get("tie_word_embeddings")
    if manifest.tied is None and header:
        manifest.tied = not any(name in HEADS for name in header)


def _some_header(manifest: Manifest) -> dict[str, TensorInfo]:
    """Tensors of the last checkpoint whose headers can be read."""
    for step, checkpoint in reversed(manifest.checkpoints.items()):
        store = manifest.files_of(step)
        tensors: dict[str, TensorInfo] = {}
        try:
            for name in checkpoint.shards:
                tensors |= read_header(partial(store.read, name), checkpoint.files[name][0])
            return tensors
        except BadTensors as error:
            log.warning("step %d: %s", step, error)
    return {}


def tokenizer_identity(checkpoint: Checkpoint, info: Mapping[str, Any]) -> str | None:
    """sha256 by which `python -m data_prep tokenizer --from FOLDER` would know the tokenizer, None without one.

    That is of tokenizer.json where it came with the model, else of the SentencePiece model.
    info: content of tokenizer_info.json, empty where there is none.
    """
    ours = info.get("kind") == "sentencepiece"
    names = (MODEL_NAME, HUGGINGFACE_NAME) if ours else (HUGGINGFACE_NAME, MODEL_NAME)
    return next((checkpoint.files[name][1] for name in names if name in checkpoint.files), None)


def _num_tokens(checkpoint: Checkpoint, texts: Mapping[str, bytes]) -> int | None:
    """Tokens that the tokenizer knows, its highest id and one; None where its files don't tell."""
    files = dict(checkpoint.tokenizer)
    if HUGGINGFACE_NAME in files:
        content = _json(checkpoint, HUGGINGFACE_NAME, texts)
        vocabulary = content.get("model", {}).get("vocab", {})
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return (
            max([*ids, *(token["id"] for token in content.get("added_tokens", []))], default=-1) + 1 or None
        )
    if MODEL_NAME in files:
        return len(parse_model(texts[files[MODEL_NAME]]).pieces)
    if "vocab.txt" in files:
        return len(texts[files["vocab.txt"]].splitlines())
    return None
