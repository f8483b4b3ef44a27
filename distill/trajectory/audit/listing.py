"""Faults that a manifest's entries show by themselves: files that lack, weights that occur twice, other tokenizers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from distill.trajectory.manifest import Checkpoint, Manifest

NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


@dataclass(frozen=True)
class Finding:
    """A fault of one checkpoint: its kind, in a word, and a sentence for a person."""

    kind: str
    sentence: str


def faults_of_listing(manifest: Manifest) -> dict[int, list[Finding]]:
    """{step: faults} of those that have any; nothing is read."""
    twice, usual = _twice(manifest), usual_tokenizer(manifest)
    faults = {}
    for step, checkpoint in manifest.checkpoints.items():
        found = [*_missing(checkpoint), *twice.get(step, [])]
        if checkpoint.tokenizer and checkpoint.tokenizer != usual:
            names = ", ".join(name for name, _ in checkpoint.tokenizer)
            found.append(Finding("tokenizer", f"its tokenizer ({names}) is another than at most steps"))
        if found:
            faults[step] = found
    return faults


def usual_tokenizer(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """Names and hashes of the tokenizer's files at most steps."""
    counted = Counter(c.tokenizer for c in manifest.checkpoints.values() if c.tokenizer)
    return counted.most_common(1)[0][0] if counted else ()


def _twice(manifest: Manifest) -> dict[int, list[Finding]]:
    """Weights that lie under several steps by their hashes: which of them is right, hashes don't tell."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for step, checkpoint in manifest.checkpoints.items():
        if checkpoint.shards and checkpoint.is_hashed:
            groups.setdefault(checkpoint.weights, []).append(step)
    return {
        step: [
            Finding(
                "duplicate",
                f"holds the same weights as step {few([s for s in steps if s != step])}: one is mislabelled",
            )
        ]
        for steps in groups.values()
        if len(steps) > 1
        for step in steps
    }


def few(steps: list[int]) -> str:
    """Some of these steps, and how many there are more."""
    return ", ".join(map(str, steps[:4])) + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")


def _missing(checkpoint: Checkpoint) -> Iterator[Finding]:
    if "config.json" not in checkpoint.files:
        yield Finding("missing", "config.json is missing")
    if not checkpoint.shards:
        yield Finding("missing", "it has no weights")
    if any(name.endswith(".bin") for name in checkpoint.shards):
        yield Finding(
            "bin",
            "it has pickled weights (.bin), which are not read: `distill trajectory pull` converts them",
        )
    for name in missing_shards(checkpoint.shards):
        yield Finding("missing", f"{name} is missing")


def missing_shards(shards: list[str]) -> list[str]:
    """Names that `model-00001-of-00003.safetensors` and the like ask for and that are not there."""
    wanted = set()
    for match in filter(None, map(NUMBERED.fullmatch, shards)):
        for number in range(1, int(match["count"]) + 1):
            wanted.add(f"{match['name']}-{number:05d}-of-{match['count']}{match['suffix']}")
    return sorted(wanted - set(shards))
