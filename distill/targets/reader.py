"""Reads targets by their place in the training order, also while they are being written."""

from __future__ import annotations

import logging
import mmap
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zstandard
from torch import Tensor

from data_prep.files import sha256_of
from data_prep.tar_records import TAR_BLOCK
from distill.sample_order import Ints
from distill.targets.decode import from_bytes, hidden_from_bytes, padded
from distill.targets.header import BadTargets, Entry, Header, Range, journal_lines, load_header
from distill.targets.sparse import SparseTargets
from distill.targets.writer import member_name

log = logging.getLogger(__name__)
WAIT_SECONDS = 2.0  # between looks for a shard that is being scored
AGAIN = "delete it and run the same `distill score` command again, which makes it anew"
OPEN_SHARDS = 16  # each holds a file descriptor
Targets = SparseTargets | Tensor  # hidden_ND where the codec keeps hidden states


class Member(NamedTuple):
    name: str
    start: int
    size: int


class TargetReader:
    """Targets of a folder. Picklable: a reader process opens its own files.

    A shard's size and sha256 are checked when a process first opens it.
    """

    def __init__(self, folder: str | Path, waits: bool = False) -> None:
        """waits: `read` waits for a shard that is not there yet. Raises BadTargets without a header."""
        self.folder, self.waits = Path(folder), waits
        self.header: Header = load_header(folder)
        self._entries: dict[int, list[Entry]] = {}
        self._open: OrderedDict[int, tuple[mmap.mmap, list[Member]]] = OrderedDict()
        self.look()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def look(self) -> None:
        """See which shards have been finished by now. Of a shard that was made twice either will do."""
        self._entries = {}
        for entry in journal_lines(self.folder):
            self._entries.setdefault(entry.first, []).append(entry)

    def first_missing(self, first: int, after: int) -> Range | None:
        """The first shard with samples of first..after-1 that is not finished. Looks again before it says so."""
        if self._first_missing(first, after):
            self.look()
        return self._first_missing(first, after)

    def _first_missing(self, first: int, after: int) -> Range | None:
        return next((r for r in self.header.ranges(first, after) if r.first not in self._entries), None)

    def size_of(self, place: Range) -> int:
        """Bytes of a finished shard."""
        return (self.folder / place.name).stat().st_size

    def refuse_damaged(self, first: int, after: int) -> None:
        """Raises BadTargets for a finished shard of these samples that is not there in its size."""
        for place in self.header.ranges(first, after):
            if place.first in self._entries:
                self._check_size(place)

    def read(self, positions: Ints, epochs_B: Ints, ids_B: Ints, counts_B: Sequence[int]) -> Targets:
        """Targets of the counted rows of these samples, `counts_B` of each, one sample after another.

        positions: in the training order, which must put the samples `ids_B` of `epochs_B` there.
        Raises BadTargets where something else was scored, or a shard lacks or is damaged.
        """
        payloads = [
            self._payload(int(p), member_name(int(e), int(i)))
            for p, e, i in zip(positions, epochs_B, ids_B, strict=True)
        ]
        codec = self.header.codec
        if codec.is_exact:
            hidden = [hidden_from_bytes(p, self.header.teacher_dtype) for p in payloads]
            self._check_counts([len(h) for h in hidden], ids_B, counts_B)
            return torch.cat(hidden)
        stored = [from_bytes(codec, p, self.header.vocab_size) for p in payloads]
        self._check_counts([s.num_rows for s in stored], ids_B, counts_B)
        return padded(stored)

    def _check_counts(self, found_B: Sequence[int], ids_B: Ints, counts_B: Sequence[int]) -> None:
        for found, asked, sample in zip(found_B, counts_B, ids_B, strict=True):
            if found != asked:
                raise BadTargets(
                    f"{self.folder} has targets of {found} rows of sample {sample}, of which {asked} count in this run: "
                    "they were made with another mask"
                )

    def _payload(self, position: int, name: str) -> bytes:
        place = self.header.range_of(position)
        content, members = self._shard(place)
        member = members[position - place.first]
        if member.name != name:
            raise BadTargets(
                f"{self.folder / place.name} has {member.name} as sample {position} of the training order, this run reads "
                f"{name} there: the targets are of another order"
            )
        packed = content[member.start : member.start + member.size]
        try:
            return zstandard.ZstdDecompressor().decompress(packed)
        except zstandard.ZstdError as error:
            raise BadTargets(f"{self.folder / place.name}: {name} can't be decompressed: {error}") from error

    # ------------------------------------------------------------------------------------------ shards

    def _shard(self, place: Range) -> tuple[mmap.mmap, list[Member]]:
        if place.first in self._open:
            self._open.move_to_end(place.first)
            return self._open[place.first]
        self._await(place)
        self._check_size(place)
        path = self.folder / place.name
        if (found := sha256_of(path)) not in {e.sha256 for e in self._entries[place.first]}:
            expected = self._entries[place.first][-1].sha256
            raise BadTargets(f"{path} has sha256 {found[:12]}, its journal says {expected[:12]}: {AGAIN}")
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        members = _members(content)
        if len(members) != len(place):
            raise BadTargets(f"{path} holds {len(members)} samples, {len(place)} expected: {AGAIN}")
        self._open[place.first] = (content, members)
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return content, members

    def _await(self, place: Range) -> None:
        told = False
        while self.first_missing(place.first, place.after):
            if not self.waits:
                raise BadTargets(
                    f"{self.folder} has no targets of samples {place.first} to {place.after - 1} yet"
                )
            if not told:
                log.info("waiting for the targets of samples %d to %d", place.first, place.after - 1)
            told = True
            time.sleep(WAIT_SECONDS)

    def _check_size(self, place: Range) -> None:
        path, sizes = self.folder / place.name, {e.bytes for e in self._entries[place.first]}
        if not path.exists():
            raise BadTargets(f"{path} is missing: run the same `distill score` command again")
        if (size := path.stat().st_size) not in sizes:
            raise BadTargets(f"{path} has {size} bytes, {sorted(sizes)} expected: {AGAIN}")


def _members(content: mmap.mmap) -> list[Member]:
    """The members of a tar that `write_shard` wrote, whose sha256 was checked."""
    members, start = [], 0
    while name := content[start : start + 100].rstrip(b"\0"):
        size = int(content[start + 124 : start + 135], 8)
        members.append(Member(name.decode(), start + TAR_BLOCK, size))
        start += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    return members
