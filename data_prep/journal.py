"""What a shards run has finished: one line a shard, so that a killed run goes on where it was."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.files import sole_writer, strangers, whole_file
from data_prep.shards import INDEX_NAME, Shard, ShardIndex, shard_from_json

JOURNAL_NAME = ".progress.jsonl"


def documents_digest(index: dict[str, Any]) -> str:
    """Identity of a documents folder: its parts, in order."""
    return hashlib.sha256("".join(part["sha256"] for part in index["parts"]).encode()).hexdigest()


class Journal:
    """The shards of a folder so far, per split.

    `is_finished` when the index is there and every shard has its size. A shard that is missing or has another
    size is dropped with all that come after it in its split, to be made again. Entering raises ValueError when
    the folder holds another run (naming the difference) or something else, or is in use. Leaving without an
    error removes the journal: the index must have been written by then.
    """

    def __init__(self, out: Path, settings: dict[str, Any], splits: Iterable[str]) -> None:
        self.out = out
        self.settings = settings
        self.shards: dict[str, list[Shard]] = {split: [] for split in splits}
        self.is_finished = False
        self._path = out / JOURNAL_NAME
        self._stack = ExitStack()

    def __enter__(self) -> "Journal":
        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.out))
            self._read()
            if not self.is_finished:
                self._rewrite()
                (self.out / INDEX_NAME).unlink(missing_ok=True)
                self._file = stack.enter_context(open(self._path, "ab"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._path.unlink(missing_ok=True)
        self._stack.close()

    def add(self, shard: Shard) -> None:
        """Note a finished shard; those of a split come in order."""
        self.shards[shard.name.rpartition("-")[0]].append(shard)
        self._file.write(_line(asdict(shard)))
        self._file.flush()

    def _read(self) -> None:
        if (self.out / INDEX_NAME).exists():
            index = ShardIndex.load(self.out)
            self._refuse_other_run(index.settings)
            rows = [row for split in index.splits.values() for row in split.shards]
            self._keep_whole(rows)
            self.is_finished = sum(map(len, self.shards.values())) == len(rows)
        elif self._path.exists():
            settings, *lines = _whole_lines(self._path)
            self._refuse_other_run(settings)
            self._keep_whole([shard_from_json(line) for line in lines])
        else:
            self._refuse_strangers()

    def _keep_whole(self, rows: Iterable[Shard]) -> None:
        broken = set()
        for row in rows:
            split = row.name.rpartition("-")[0]
            path = self.out / row.name
            if split in broken or not path.is_file() or path.stat().st_size != row.bytes:
                broken.add(split)
            else:
                self.shards[split].append(row)

    def _refuse_other_run(self, found: dict[str, Any]) -> None:
        for key, value in self.settings.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{self.out} holds other shards: their {key} is {found.get(key)!r}, now {value!r}; "
                    "give another folder to --out, or delete this one"
                )

    def _refuse_strangers(self) -> None:
        if names := strangers(self.out):
            raise ValueError(
                f"{self.out} is not empty (it holds {names[0]!r}); give an empty folder to --out"
            )

    def _rewrite(self) -> None:
        with whole_file(self._path) as file:
            file.write(_line(self.settings))
            for shards in self.shards.values():
                file.writelines(_line(asdict(shard)) for shard in shards)


def _line(values: dict[str, Any]) -> bytes:
    return (json.dumps(values) + "\n").encode()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal; the last one is left out if a kill cut it short."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
