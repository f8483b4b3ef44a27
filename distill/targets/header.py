"""header.json: what was scored, by whom and how. It binds a folder of targets to its data, masks, teacher and codec."""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import read_json, write_json
from distill.targets.codecs import Codec

SCHEMA, NAME = 1, "header.json"


class BadTargets(ValueError):
    """Stored targets from which a run should not learn."""


@dataclass(frozen=True)
class Scorer:
    """A teacher checkpoint: sha256 of its weight files, in the order of their names."""

    weights: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Samples first..after-1 of the training order, taught by `checkpoint`; one shard."""

    first: int
    after: int
    checkpoint: int

    @property
    def name(self) -> str:
        return f"targets-{self.first:012d}.tar"

    def __len__(self) -> int:
        return self.after - self.first


@dataclass(frozen=True)
class Header:
    """What all targets of a folder have in common.

    samples: of which data, in which order, how masked, by dotted key. stages: [first sample, teacher step].
    available, losses: teacher steps and validation losses that the schedule was made of. scorers: the steps that teach.
    """

    codec: Codec
    vocab_size: int
    samples: dict[str, Any]
    tokenizer_sha256: str
    teacher_dtype: str
    stages: tuple[tuple[int, int], ...]
    total_samples: int
    samples_per_shard: int
    available: tuple[int, ...]
    losses: dict[int, float]
    checkpoints: dict[int, Scorer]
    command: str = field(default="", compare=False)
    url: str = field(default="", compare=False)  # the folder; not stored

    def checkpoint_at(self, sample: int) -> int:
        """Teacher step that scored this sample of the training order."""
        return self.stages[self._stage(sample)][1]

    def _stage(self, sample: int) -> int:
        return bisect.bisect_right([first for first, _ in self.stages], sample) - 1

    def range_of(self, sample: int) -> Range:
        """The shard that holds this sample. Shards are cut at the stages, so that one teacher scored each."""
        stage = self._stage(sample)
        start, checkpoint = self.stages[stage]
        end = self.stages[stage + 1][0] if stage + 1 < len(self.stages) else self.total_samples
        first = sample - (sample - start) % self.samples_per_shard
        return Range(first, min(first + self.samples_per_shard, end), checkpoint)

    def ranges(self, first: int, after: int) -> Iterator[Range]:
        """The shards that hold samples first..after-1, in order."""
        while first < min(after, self.total_samples):
            found = self.range_of(first)
            yield found
            first = found.after

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        told = dataclasses.asdict(self)
        del told["url"]
        write_json(folder / NAME, {"schema": SCHEMA, **told})

    def refuse_other(self, other: Header) -> None:
        """Raises BadTargets where a folder with this header is to hold what `other` describes."""
        for f in dataclasses.fields(self):
            now, asked = getattr(self, f.name), getattr(other, f.name)
            if f.compare and now != asked:
                raise BadTargets(
                    f"{self.url} holds other targets: {_difference(f.name, now, asked)}; give another folder to --out"
                )


def _difference(name: str, now: Any, asked: Any) -> str:
    """Of mappings the first key that differs."""
    if isinstance(now, dict) and isinstance(asked, dict):
        key = next(k for k in [*now, *asked] if now.get(k) != asked.get(k))
        return f"their {name} {key} is {now.get(key)}, now {asked.get(key)}"
    return f"their {name} is {now}, now {asked}"


def load_header(folder: str | Path) -> Header:
    """The header of a folder. Raises BadTargets if there is none that can be read."""
    path = Path(folder) / NAME
    if not path.exists():
        raise BadTargets(f"{path} does not exist: targets are made by `distill score CONFIG --out {folder}`")
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise BadTargets(f"{path} has another schema than {SCHEMA}: score again into another folder")
    try:
        return _from_json(content, str(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadTargets(
            f"{path} lacks or misspells a field: {error!r}; score again into another folder"
        ) from error


def _from_json(content: dict[str, Any], url: str) -> Header:
    read = {
        "codec": Codec(**content["codec"]),
        "stages": tuple((int(first), int(step)) for first, step in content["stages"]),
        "available": tuple(content["available"]),
        "losses": {int(step): loss for step, loss in content["losses"].items()},
        "checkpoints": {
            int(step): Scorer(tuple(scorer["weights"])) for step, scorer in content["checkpoints"].items()
        },
    }
    return Header(**{**content, **read}, url=url)


# ------------------------------------------------------------------------------------------------ journal


@dataclass(frozen=True)
class Entry:
    """A finished shard: its first sample, counted rows, bytes of the tar and of the payloads before compression."""

    first: int
    rows: int
    bytes: int
    payload_bytes: int
    sha256: str


def journal_lines(folder: Path) -> Iterator[Entry]:
    """Every finished shard that any job has noted. A line that is being written, or was cut off, is left out."""
    for path in sorted(folder.glob("part-*.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                try:
                    yield Entry(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise BadTargets(
                        f"{path} holds the line {line[:80]!r}, which is none of this format: delete the file and score "
                        "again, which makes its shards anew"
                    ) from error
