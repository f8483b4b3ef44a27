"""Owner of the shards folder: numbered tars of packed sequences beside an `index.json` that describes them.

    train-00000.tar ... validation-00000.tar ...  tokenizer/  index.json (last: no index, no data set)

A document is packed as `<s> tokens </s>`; documents follow each other and are cut to `sequence_length`. Only
the last sequence of a documents part is padded. Control ids never come out of text: `</s>` marks the
boundaries. Any `webdataset` reads the tars; `ShardReader` reads a sample by number, since all members have
one size.
"""

import json
import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import sha256_of, write_json
from data_prep.tar_records import RecordLayout, write_tar

SCHEMA = 1
INDEX_NAME = "index.json"
_OPEN_SHARDS = 64  # each map holds a file descriptor


class CorruptShard(ValueError):
    """A shard is missing, has another size or other bytes than its index says."""


@dataclass(frozen=True)
class TokenizerInfo:
    """Identity of a tokenizer and its special ids; an id is None where the tokenizer has no such token."""

    sha256: str
    vocab_size: int
    pad_id: int
    unk_id: int | None
    bos_id: int
    eos_id: int
    mask_id: int | None

    @property
    def dtype(self) -> str:
        """Smallest unsigned type that holds every id: "uint16" or "uint32"."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    @property
    def begin_ids(self) -> list[int]:
        """What stands before a document: nothing where one token is both bos and eos, which only stands behind."""
        return [] if self.bos_id == self.eos_id else [self.bos_id]


@dataclass(frozen=True)
class Shard:
    """One tar. `end` is the place (part, block, token) in the documents behind its last token."""

    name: str
    samples: int
    tokens: int  # without padding
    bytes: int
    sha256: str
    end: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Split:
    samples: int
    tokens: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> "Split":
        rows = tuple(shards)
        return cls(sum(row.samples for row in rows), sum(row.tokens for row in rows), rows)


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says; `documents` is {"in", "kept", "dropped": {reason: n}} of the stages before."""

    sequence_length: int
    dtype: str
    tokenizer: TokenizerInfo
    splits: dict[str, Split]
    documents: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> RecordLayout:
        return RecordLayout(self.sequence_length, self.dtype)

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """Read and check `folder/index.json`; ValueError names the file and what is wrong with it."""
        path = Path(folder) / INDEX_NAME
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"{path} is missing: run `python -m data_prep shards` to its end, it goes on"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}); delete it and run the shards command again"
            ) from None
        if not isinstance(values, dict) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"{path} has schema {found!r}, this version reads {SCHEMA}; make the shards again"
            )
        try:
            index = cls._from_json(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks or misspells a field: {error!r}; make the shards again") from None
        index._check(path)
        return index

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> "ShardIndex":
        return cls(
            sequence_length=values["sequence_length"],
            dtype=values["dtype"],
            tokenizer=TokenizerInfo(**values["tokenizer"]),
            splits={name: _split_from_json(split) for name, split in values["splits"].items()},
            documents=values["documents"],
            command=values["command"],
            settings=values.get("settings", {}),
        )

    def _check(self, path: Path) -> None:
        problems = []
        if not isinstance(self.sequence_length, int) or self.sequence_length < 1:
            problems.append(f"sequence_length is {self.sequence_length!r}, not a positive number")
        elif self.dtype != self.tokenizer.dtype:
            problems.append(
                f"dtype is {self.dtype!r}, {self.tokenizer.vocab_size} ids need {self.tokenizer.dtype}"
            )
        for name, split in self.splits.items():
            problems += [f"{name}: {problem}" for problem in _split_problems(split)]
        if problems:
            raise ValueError(f"{path} contradicts itself: {'; '.join(problems)}; make the shards again")

    def save(self, folder: str | Path) -> None:
        """Write `folder/index.json`, whole or not at all."""
        write_json(Path(folder) / INDEX_NAME, {"schema": SCHEMA, **asdict(self)})


def _split_from_json(values: Mapping[str, Any]) -> Split:
    return Split(values["samples"], values["tokens"], tuple(shard_from_json(row) for row in values["shards"]))


def shard_from_json(row: Mapping[str, Any]) -> Shard:
    """The row that `dataclasses.asdict` and JSON made of a `Shard`."""
    return Shard(**{**row, "end": tuple(row["end"]) if row.get("end") else None})


def _split_problems(split: Split) -> Iterator[str]:
    counted = Split.of(split.shards)
    if (counted.samples, counted.tokens) != (split.samples, split.tokens):
        yield (
            f"shards hold {counted.samples} samples and {counted.tokens} tokens, "
            f"the split says {split.samples} and {split.tokens}"
        )
    for shard in split.shards:
        if Path(shard.name).name != shard.name:
            yield f"shard name {shard.name!r} is not a plain file name"


class ShardReader:
    """Random access to the samples of one split: `reader[i]` is a new array [sequence_length].

    A shard's size and sha256 are checked when a process first opens it. Picklable: a worker opens its own.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.index = ShardIndex.load(folder)
        if split not in self.index.splits:
            raise ValueError(
                f"{folder} has no split {split!r}; it has {', '.join(sorted(self.index.splits))}"
            )
        self.split = split
        self._shards = self.index.splits[split].shards
        self._layout = self.index.layout
        self._offset = self._layout.payload_offset
        self._record = self._layout.record_bytes
        self._dtype = self._layout.numpy_dtype
        self._first = np.cumsum([0] + [shard.samples for shard in self._shards]).tolist()
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return self.index.splits[self.split].samples

    def __getitem__(self, sample: int) -> np.ndarray:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of split {self.split!r}, which has {len(self)}")
        number = bisect_right(self._first, sample) - 1
        offset = (sample - self._first[number]) * self._record + self._offset
        return np.frombuffer(self._map(number), self._dtype, self._layout.sequence_length, offset).copy()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict(), "_verified": set()}

    def _map(self, number: int) -> mmap.mmap:
        if number in self._maps:
            self._maps.move_to_end(number)
            return self._maps[number]
        shard = self._shards[number]
        if number not in self._verified:
            check_shard(self.folder, shard)
            self._verified.add(number)
        with open(self.folder / shard.name, "rb") as file:
            self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._maps) > _OPEN_SHARDS:
            self._maps.popitem(last=False)
        return self._maps[number]


def check_shard(folder: Path, shard: Shard) -> None:
    """Raise CorruptShard unless the file has the size and sha256 of its row in the index."""
    path = folder / shard.name
    advice = "delete it if it is there and run the shards command again, which makes it anew"
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError:
        raise CorruptShard(f"{path} is missing, {shard.bytes} bytes expected; {advice}") from None
    if found_bytes != shard.bytes:
        raise CorruptShard(f"{path} has {found_bytes} bytes, {shard.bytes} expected; {advice}")
    found = sha256_of(path)
    if found != shard.sha256:
        raise CorruptShard(f"{path} has sha256 {found}, {shard.sha256} expected; {advice}")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def write_shard(
    folder: Path,
    split: str,
    number: int,
    tokens_NL: np.ndarray,
    *,
    first_sample: int,
    pad_id: int,
    layout: RecordLayout,
    end: tuple[int, int, int] | None = None,
) -> Shard:
    """Write shard `number` of a split and return its row. tokens_NL: [samples, sequence_length]."""
    name = shard_name(split, number)
    num_bytes, sha256 = write_tar(folder / name, tokens_NL, first_sample, layout)
    return Shard(name, len(tokens_NL), _count_tokens(tokens_NL, pad_id), num_bytes, sha256, end)


def _count_tokens(tokens_NL: np.ndarray, pad_id: int) -> int:
    step = 1 << 14  # rows; a memory map of a big shard is not to be copied whole
    return sum(
        int(np.count_nonzero(tokens_NL[start : start + step] != pad_id))
        for start in range(0, len(tokens_NL), step)
    )


def write_split(
    folder: str | Path,
    split: str,
    sequences: Iterable[np.ndarray],
    tokenizer: TokenizerInfo,
    *,
    sequence_length: int,
    samples_per_shard: int = 65536,
) -> Split:
    """Write sequences (each [sequence_length]) as the shards of one split: same input, same bytes."""
    layout = RecordLayout(sequence_length, tokenizer.dtype)
    rows: list[Shard] = []
    waiting: list[np.ndarray] = []

    def flush() -> None:
        tokens_NL = np.stack(waiting)
        first = sum(row.samples for row in rows)
        rows.append(
            write_shard(
                Path(folder),
                split,
                len(rows),
                tokens_NL,
                first_sample=first,
                pad_id=tokenizer.pad_id,
                layout=layout,
            )
        )
        waiting.clear()

    for sequence in sequences:
        waiting.append(_checked(sequence, layout, tokenizer))
        if len(waiting) == samples_per_shard:
            flush()
    if waiting:
        flush()
    return Split.of(rows)


def write_shards(
    folder: str | Path,
    splits: Mapping[str, Iterable[np.ndarray]],
    tokenizer: TokenizerInfo,
    *,
    sequence_length: int,
    samples_per_shard: int = 65536,
    documents: Mapping[str, Any] | None = None,
    command: str = "",
) -> ShardIndex:
    """Write ready sequences of every split, then the index (text goes through `data_prep.pack` instead)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = {
        name: write_split(
            folder,
            name,
            sequences,
            tokenizer,
            sequence_length=sequence_length,
            samples_per_shard=samples_per_shard,
        )
        for name, sequences in splits.items()
    }
    index = ShardIndex(sequence_length, tokenizer.dtype, tokenizer, written, dict(documents or {}), command)
    index.save(folder)
    return index


def _checked(sequence: np.ndarray, layout: RecordLayout, tokenizer: TokenizerInfo) -> np.ndarray:
    array = np.asarray(sequence)
    if array.shape != (layout.sequence_length,):
        raise ValueError(f"a sequence has shape {array.shape}, ({layout.sequence_length},) expected")
    if array.min() < 0 or array.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"a sequence has ids {array.min()}..{array.max()}, 0..{tokenizer.vocab_size - 1} expected"
        )
    return array.astype(layout.numpy_dtype)
