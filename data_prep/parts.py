"""The documents format between stages: parts `NAME-00000.jsonl.zst` and, written last, `index.json`.

One line of a part is {"id": str, "source": str, "title": str, "text": str}. A folder without `index.json` is
unfinished: `.progress.json` in it says which parts are whole, and the same command goes on from there.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import zstandard

from data_prep.files import (
    fingerprint_of,
    read_json,
    remove_temporary_files,
    sha256_of,
    strangers,
    whole_file,
    write_json,
)
from data_prep.lines import file_lines
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

    `kept` holds (JSON lines, number of documents) for each output of the stage; `seen` documents came in,
    `dropped` counts the others by reason; `notes` counts facts about kept documents, `input_bytes` moves the
    progress bar.
    """

    kept: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    input_bytes: int = 0


@dataclass(frozen=True)
class Stage:
    """A run of one stage: where it writes, and what decides that (never the number of workers).

    `outputs` are the names that parts begin with; the stage's name if none are given.
    """

    name: str
    out: Path
    inputs: list[dict[str, Any]]
    settings: dict[str, Any]
    command: str
    outputs: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """What part names begin with."""
        return self.outputs or (self.name,)

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
    for line, _ in file_lines(path):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); delete its folder, run that stage again"
            ) from error


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
    if names := strangers(stage.out):
        raise ValueError(f"{stage.out} is not empty (it holds {names[0]!r}); give an empty --out")
    write_json(stage.out / PROGRESS_NAME, stage.header() | _nothing_yet(stage))
    return None


def _nothing_yet(stage: Stage) -> dict[str, Any]:
    return {
        "counts": {"in": 0, "kept": 0, "dropped": {}},
        "notes": {},
        "parts": [],
        "next": dict.fromkeys(stage.names(), 0),
        "input_bytes": 0,
    }


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
    renewed; a killed run repeats at most the tasks of one part. ValueError for input without documents.
    """
    finished = open_folder(stage)
    if finished is not None:
        return finished
    work = _Work(stage)
    first = work.next_task()
    try:
        with progress(stage.name, total_bytes, initial=work.state["input_bytes"]) as advance:
            results = ordered_map(extract, islice(tasks, first, None), workers)
            for number, batch in enumerate(results, first):
                work.add(number, batch)
                advance(batch.input_bytes)
        return work.finish()
    except ValueError:
        forget_if_empty(stage.out)
        raise


def forget_if_empty(out: Path) -> None:
    """Bad input that gave nothing leaves no trace, so that the mended input may use the same folder.

    The folder itself goes with the lock on it (`files.sole_writer`).
    """
    if strangers(out) == [PROGRESS_NAME]:
        (out / PROGRESS_NAME).unlink()


class _Work:
    """Parts written so far, and for each output the batches of the part that is filling up.

    Outputs fill at their own pace: `state["next"]` says for each which task it waits for. A run that goes on
    starts with the least of them, and an output skips what it already has.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.outputs = stage.names()
        self.progress_path = stage.out / PROGRESS_NAME
        self.waiting: dict[str, list[Batch]] = {name: [] for name in self.outputs}
        self.state = read_json(self.progress_path)

    def next_task(self) -> int:
        return min(self.state["next"].values())

    def add(self, number: int, batch: Batch) -> None:
        for name in self.outputs:
            if number < self.state["next"][name] + len(self.waiting[name]):
                continue
            self.waiting[name].append(_only(name, batch))
            if sum(len(waiting.kept[name][0]) for waiting in self.waiting[name]) >= PART_BYTES:
                self._flush(name)
                write_json(self.progress_path, self.state)

    def finish(self) -> dict[str, Any]:
        for name in self.outputs:
            self._flush(name)
        if not self.state["counts"]["in"]:
            names = ", ".join(source["name"] for source in self.stage.inputs)
            raise ValueError(f"no documents in {names}: give files that hold some")
        index = {key: value for key, value in self.state.items() if key not in ("next", "input_bytes")}
        index["parts"].sort(
            key=lambda part: (self.outputs.index(part["name"].rsplit("-", 1)[0]), part["name"])
        )
        write_json(self.stage.out / INDEX_NAME, index)
        self.progress_path.unlink(missing_ok=True)
        return index

    def _flush(self, name: str) -> None:
        batches = [batch.kept[name] for batch in self.waiting[name]]
        documents = sum(number for _, number in batches)
        if documents:
            have = sum(part["name"].startswith(f"{name}-") for part in self.state["parts"])
            path = self.stage.out / f"{name}-{have:05d}.jsonl.zst"
            self.state["parts"].append(write_part(path, b"".join(lines for lines, _ in batches), documents))
        for batch in self.waiting[name]:
            if name == self.outputs[0]:  # each task is counted once, with the first output
                self._count(batch)
        self.state["next"][name] += len(batches)
        self.waiting[name] = []

    def _count(self, batch: Batch) -> None:
        counts = self.state["counts"]
        counts["in"] += batch.seen
        counts["kept"] += sum(number for _, number in batch.kept.values())
        counts["dropped"] = _sum(counts["dropped"], batch.dropped)
        self.state["notes"] = _sum(self.state["notes"], batch.notes)
        self.state["input_bytes"] += batch.input_bytes


def _only(name: str, batch: Batch) -> Batch:
    """The batch with the lines of one output, but all its counts.

    An output that fills slowly must not hold on to the lines of the others: with 1% for validation that was
    most of a gigabyte.
    """
    kept = {other: (lines if other == name else b"", number) for other, (lines, number) in batch.kept.items()}
    return replace(batch, kept={name: (b"", 0), **kept})


def _sum(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(counts) + Counter(more)).items()))


def summary(index: dict[str, Any]) -> str:
    """One line: how many documents came in, were kept, were dropped and why."""
    counts = index["counts"]
    dropped = ", ".join(f"{reason} {number}" for reason, number in counts["dropped"].items()) or "nothing"
    kept = f"{counts['kept']} kept in {len(index['parts'])} parts"
    return f"{index['stage']}: {counts['in']} in, {kept}; dropped: {dropped}"
