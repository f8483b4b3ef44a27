"""The documents format between stages: parts `NAME-00000.jsonl.zst` and, written last, `index.json`.

One line of a part is {"id": str, "source": str, "title": str, "text": str}. A folder without `index.json` is
unfinished: `.progress.json` in it says which parts are whole, and the same command goes on from there.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import zstandard

from data_prep.files import (
    fingerprint_of,
    read_json,
    remove_temporary_files,
    sha256_of,
    whole_file,
    write_json,
)
from data_prep.parallel import ordered_map
from data_prep.progress import progress

SCHEMA = 1
INDEX_NAME = "index.json"
PROGRESS_NAME = ".progress.json"
PART_BYTES = 8 << 20  # of JSON lines; small, so that the next stage has parts to share among processes
ZSTD_LEVEL = 3

Task = TypeVar("Task")


class Document(TypedDict):
    """One document; `title` may be empty, `id` is unique within its source."""

    id: str
    source: str
    title: str
    text: str


@dataclass
class Batch:
    """What one task gave: JSON lines of the kept documents and what became of every document seen.

    `seen` documents came in, `documents` are kept, `dropped` counts the others by reason;
    `notes` counts facts about kept documents, `input_bytes` moves the progress bar.
    """

    lines: bytes = b""
    seen: int = 0
    documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    input_bytes: int = 0


@dataclass(frozen=True)
class Stage:
    """A run of one stage: where it writes, what decides its output (never the number of workers)."""

    name: str
    out: Path
    inputs: list[dict[str, Any]]
    settings: dict[str, Any]
    command: str

    def header(self) -> dict[str, Any]:
        """The part of index.json that is known before the work; equal headers give equal bytes."""
        return {
            "schema": SCHEMA,
            "stage": self.name,
            "command": self.command,
            "settings": self.settings,
            "inputs": self.inputs,
        }


def describe_inputs(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Fingerprints of the input files, in order; OSError names a file that cannot be read."""
    return [fingerprint_of(path) for path in paths]


def encode_document(document: Document) -> bytes:
    """One JSON line; lone surrogates, which UTF-8 cannot hold, are left out."""
    return (json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8", "ignore")


def write_part(path: Path, lines: bytes, documents: int) -> dict[str, Any]:
    """Write one part whole and return its entry for the index."""
    packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(lines)
    with whole_file(path) as file:
        file.write(packed)
    return {
        "name": path.name,
        "documents": documents,
        "json_bytes": len(lines),
        "bytes": len(packed),
        "sha256": sha256_of(path),
    }


def read_part(path: Path) -> Iterator[Document]:
    """The documents of one part, read as a stream; ValueError names a damaged part."""
    reader = zstandard.ZstdDecompressor()
    try:
        with open(path, "rb") as file, reader.stream_reader(file, read_across_frames=True) as stream:
            for line in _lines(stream):
                yield json.loads(line)
    except (zstandard.ZstdError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, run that stage again") from error


def _lines(stream: zstandard.ZstdDecompressionReader) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        raise ValueError(f"the last line, {len(rest)} bytes, has no end")


def load_index(folder: Path) -> dict[str, Any]:
    """The index of a finished documents folder; ValueError when it is missing or of another schema."""
    path = folder / INDEX_NAME
    if not path.is_file():
        state = "is unfinished" if (folder / PROGRESS_NAME).exists() else "holds no documents"
        raise ValueError(f"{folder} {state} (no {INDEX_NAME}); run the stage that writes it to its end")
    index: dict[str, Any] = read_json(path)
    if index.get("schema") != SCHEMA or "parts" not in index:
        raise ValueError(f"{path} has schema {index.get('schema')!r}, this version reads schema {SCHEMA}")
    return index


def part_paths(folder: Path, split: str | None = None) -> list[Path]:
    """Parts of a finished folder in order, of one split ("train" or "validation") if named.

    Raises ValueError when a part is missing or has another size than the index says.
    """
    paths = []
    for part in load_index(folder)["parts"]:
        path = folder / part["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != part["bytes"]:
            raise ValueError(f"{path}: {part['bytes']} bytes expected, found {size}; run that stage again")
        if split is None or part["name"].startswith(f"{split}-"):
            paths.append(path)
    return paths


def open_folder(stage: Stage) -> dict[str, Any] | None:
    """Make the output folder ready. Returns the index if this very run is finished, else None.

    Raises ValueError when the folder holds the work of another command or of other inputs.
    """
    stage.out.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(stage.out)
    for name in (INDEX_NAME, PROGRESS_NAME):
        if (stage.out / name).is_file():
            found = read_json(stage.out / name)
            _refuse_other_run(stage, found)
            if name == INDEX_NAME:
                part_paths(stage.out)
                return dict(found)
            return None
    strangers = sorted(path.name for path in stage.out.iterdir())
    if strangers:
        raise ValueError(f"{stage.out} is not empty (it holds {strangers[0]!r}); give an empty --out")
    return None


def _refuse_other_run(stage: Stage, found: dict[str, Any]) -> None:
    differing = [key for key, value in stage.header().items() if found.get(key) != value]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{stage.out} holds another run: its {key} is {found.get(key)!r}, now {stage.header()[key]!r}; "
            "give another folder to --out, or delete this one"
        )


def convert(
    stage: Stage, tasks: Iterable[Task], extract: Callable[[Task], Batch], workers: int, total_bytes: int
) -> dict[str, Any]:
    """Run `extract` over `tasks` and write what it gives as parts, in order; returns the index.

    Parts end at task borders, so they depend on the tasks alone. After each part the progress file is
    renewed; a killed run repeats at most the tasks of one part. Raises ValueError for input without documents.
    """
    finished = open_folder(stage)
    if finished is not None:
        return finished
    work = _Parts(stage)
    try:
        with progress(stage.name, total_bytes, initial=work.state["input_bytes"]) as advance:
            for batch in ordered_map(extract, islice(tasks, work.state["tasks"], None), workers):
                work.add(batch)
                advance(batch.input_bytes)
        return work.finish()
    except ValueError:
        work.forget_if_empty()
        raise


class _Parts:
    """The parts written so far, and the one that is filling up."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.progress_path = stage.out / PROGRESS_NAME
        if self.progress_path.is_file():
            self.state = read_json(self.progress_path)
        else:
            self.state = stage.header() | {
                "tasks": 0,
                "input_bytes": 0,
                "counts": {"in": 0, "kept": 0, "dropped": {}},
                "notes": {},
                "parts": [],
            }
            write_json(self.progress_path, self.state)
        self.waiting: list[Batch] = []
        self.waiting_bytes = 0

    def add(self, batch: Batch) -> None:
        self.waiting.append(batch)
        self.waiting_bytes += len(batch.lines)
        if self.waiting_bytes >= PART_BYTES:
            self._flush()
            write_json(self.progress_path, self.state)

    def forget_if_empty(self) -> None:
        """Bad input that gave nothing leaves no trace, so that the mended input may use the same folder."""
        if not self.state["parts"]:
            self.progress_path.unlink(missing_ok=True)
            self.stage.out.rmdir()

    def finish(self) -> dict[str, Any]:
        self._flush()
        if not self.state["counts"]["in"]:
            names = ", ".join(source["name"] for source in self.stage.inputs)
            raise ValueError(f"no documents in {names}: give files that hold some")
        index = {key: value for key, value in self.state.items() if key not in ("tasks", "input_bytes")}
        write_json(self.stage.out / INDEX_NAME, index)
        self.progress_path.unlink(missing_ok=True)
        return index

    def _flush(self) -> None:
        documents = sum(batch.documents for batch in self.waiting)
        if documents:
            path = self.stage.out / f"{self.stage.name}-{len(self.state['parts']):05d}.jsonl.zst"
            lines = b"".join(batch.lines for batch in self.waiting)
            self.state["parts"].append(write_part(path, lines, documents))
        for batch in self.waiting:
            self._count(batch)
        self.waiting, self.waiting_bytes = [], 0

    def _count(self, batch: Batch) -> None:
        counts = self.state["counts"]
        counts["in"] += batch.seen
        counts["kept"] += batch.documents
        counts["dropped"] = dict(sorted((Counter(counts["dropped"]) + batch.dropped).items()))
        self.state["notes"] = dict(sorted((Counter(self.state["notes"]) + batch.notes).items()))
        self.state["tasks"] += 1
        self.state["input_bytes"] += batch.input_bytes


def summary(index: dict[str, Any]) -> str:
    """One line: how many documents came in, were kept, were dropped and why."""
    counts = index["counts"]
    dropped = ", ".join(f"{reason} {number}" for reason, number in counts["dropped"].items()) or "nothing"
    kept = f"{counts['kept']} kept in {len(index['parts'])} parts"
    return f"{index['stage']}: {counts['in']} in, {kept}; dropped: {dropped}"
