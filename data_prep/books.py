"""Books and other collections to documents: Project Gutenberg files, .txt, .jsonl (.gz, .zst), .parquet."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.etexts import NotText, decode, gutenberg_parts, unwrapped
from data_prep.files import sole_writer
from data_prep.lines import file_lines
from data_prep.parallel import default_workers
from data_prep.parts import Batch, Document, Stage, convert, describe_inputs, encode_document, summary

RULES = 2  # raise when the same files would give other documents
BATCH_BYTES = 1 << 20
MAX_TEXT_BYTES = 32 << 20  # of one .txt file, which is one document; the longest novels have 10 MB
KINDS = (".txt", ".text", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
EXAMPLE = """example:
  python -m data_prep books gutenberg/ speeches/*.txt corpus.jsonl.zst --text-column text --out work/books

A .txt file is one document; in .jsonl and .parquet a row is one. Folders are searched for all of these.
Project Gutenberg's licence is cut and hard-wrapped prose is joined; verse keeps its lines.
Interrupted, the same command goes on; the documents are the same bytes for any number of workers.
"""


@dataclass(frozen=True)
class Files:
    """A task: text files as (path, name in ids)."""

    files: tuple[tuple[Path, str], ...]
    input_bytes: int


@dataclass(frozen=True)
class Rows:
    """A task: rows of the table `name` from number `first` on, as JSON lines or as values."""

    name: str
    text_column: str
    first: int
    rows: tuple[Any, ...]
    input_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m data_prep books`."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="file or folder, in reading order"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the documents")
    parser.add_argument(
        "--text-column", default="text", help="of .jsonl and .parquet rows (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes (default: cores, %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert the files; returns 0. Raises ValueError or OSError for files that cannot be read."""
    files = find_files(args.paths)
    stage = Stage(
        name="books",
        out=args.out,
        inputs=describe_inputs(path for path, _ in files),
        settings={"rules": RULES, "text_column": args.text_column},
        command=" ".join(
            [
                "python -m data_prep books",
                *(path.name for path in args.paths),
                "--text-column",
                args.text_column,
            ]
        ),
    )
    total_bytes = sum(path.stat().st_size for path, _ in files)
    with sole_writer(args.out):
        print(summary(convert(stage, tasks(files, args.text_column), extract, args.workers, total_bytes)))
    return 0


def find_files(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    """(file, name in document ids) of all inputs, folders searched in sorted order; no name comes twice.

    Raises ValueError for a path that does not exist, a file of unknown kind, or a folder without known files.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
            if not inside:
                raise ValueError(f"{path} holds none of {', '.join(KINDS)}")
            found += [(file, file.relative_to(path).as_posix()) for file in inside]
        elif not path.exists():
            raise ValueError(f"{path} does not exist")
        elif not _kind(path):
            raise ValueError(f"{path} is none of {', '.join(KINDS)}; convert it to one of them")
        else:
            found.append((path, path.name))
    return list(zip((path for path, _ in found), _distinct([name for _, name in found]), strict=True))


def _distinct(names: list[str]) -> list[str]:
    """The names, where one comes again with a number behind it: `a.txt`, `a.txt (2)`."""
    taken = set(names)
    times: Counter[str] = Counter()
    result = []
    for name in names:
        times[name] += 1
        new = name
        while times[name] > 1 and new in taken:
            new = f"{name} ({times[name]})"
            times[name] += new in taken
        taken.add(new)
        result.append(new)
    return result


def _kind(path: Path) -> str | None:
    return next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)


def tasks(files: Iterable[tuple[Path, str]], text_column: str) -> Iterator[Files | Rows]:
    """Tasks of about BATCH_BYTES each, which depend on the files alone."""
    waiting: list[tuple[Path, str]] = []
    size = 0
    for path, name in files:
        is_text = _kind(path) in (".txt", ".text")
        if is_text:
            waiting.append((path, name))
            size += path.stat().st_size
        if waiting and (size >= BATCH_BYTES or not is_text):
            yield Files(tuple(waiting), size)
            waiting, size = [], 0
        if not is_text:
            yield from _table_tasks(path, name, text_column)
    if waiting:
        yield Files(tuple(waiting), size)


def _table_tasks(path: Path, name: str, text_column: str) -> Iterator[Rows]:
    rows: list[Any] = []
    size = first = accounted = 0
    for row, row_bytes, position in _table_rows(path, text_column):
        rows.append(row)
        size += row_bytes
        if size >= BATCH_BYTES:
            yield Rows(name, text_column, first, tuple(rows), position - accounted)
            first, rows, size, accounted = first + len(rows), [], 0, position
    yield Rows(name, text_column, first, tuple(rows), path.stat().st_size - accounted)


def _table_rows(path: Path, text_column: str) -> Iterator[tuple[Any, int, int]]:
    """(row, its bytes, bytes of the file read so far)"""
    if _kind(path) == ".parquet":
        yield from _parquet_rows(path, text_column)
    else:
        for line, position in file_lines(path):
            if line.strip():
                yield line, len(line), position


def _parquet_rows(path: Path, text_column: str) -> Iterator[tuple[dict[str, Any], int, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            _require_column(str(path), text_column, names)
            columns = [name for name in (text_column, "id", "title") if name in names]
            # binary instead of string: a row that is not UTF-8 is counted later, not fatal here
            for batch in table.iter_batches(batch_size=64, columns=columns):
                values = [_column_bytes(column) for column in batch.columns]
                for row in zip(*values, strict=True):
                    yield dict(zip(columns, row, strict=True)), len(row[0] or b""), 0
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}") from error


def _column_bytes(column: Any) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        return list(column.cast(pyarrow.large_binary()).to_pylist())
    return [None if value is None else str(value).encode() for value in column.to_pylist()]


def _require_column(name: str, wanted: str, columns: Iterable[str]) -> None:
    if wanted not in columns:
        raise ValueError(f"{name} has no column {wanted!r}, only {sorted(columns)}; set --text-column")


def extract(task: Files | Rows) -> Batch:
    """The documents of a task, and the reasons of the files or rows that give none."""
    batch = Batch(input_bytes=task.input_bytes)
    found = _file_documents(task, batch) if isinstance(task, Files) else _row_documents(task, batch)
    lines = [encode_document(document) for document in found]
    batch.kept["books"] = b"".join(lines), len(lines)
    return batch


def _file_documents(task: Files, batch: Batch) -> Iterator[Document]:
    for path, name in task.files:
        batch.seen += 1
        if path.stat().st_size > MAX_TEXT_BYTES:
            batch.dropped["too_large"] += 1
            continue
        try:
            text, encoding = decode(path.read_bytes())
        except NotText:
            batch.dropped["not_text"] += 1
            continue
        document = book(text, name)
        if document["text"]:
            batch.notes[f"encoding {encoding}"] += 1
            yield document
        else:
            batch.dropped["no_text"] += 1


def book(text: str, name: str) -> Document:
    """The document of one text file; `name` is its path below the folder given."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    source, title = "text", Path(name).stem.replace("_", " ")
    if parts := gutenberg_parts(text):
        number, found_title, text = parts
        source, name, title = "gutenberg", number or name, found_title or title
    return {"id": f"{source}:{name}", "source": source, "title": title, "text": unwrapped(text).strip()}


def _row_documents(task: Rows, batch: Batch) -> Iterator[Document]:
    for number, row in enumerate(task.rows, task.first):
        batch.seen += 1
        try:
            fields = _parsed_row(row, f"{task.name} row {number + 1}", task.text_column)
        except UnicodeDecodeError:
            batch.dropped["invalid_utf8"] += 1
            continue
        if not fields["text"].strip():
            batch.dropped["no_text"] += 1
            continue
        name = fields["id"] or f"{task.name}:{number}"
        yield {"id": name, "source": task.name, "title": fields["title"], "text": fields["text"]}


def _parsed_row(row: Any, where: str, text_column: str) -> dict[str, str]:
    """Fields id, title and text of a row; ValueError says where a row has no such text."""
    if isinstance(row, bytes):
        row = _json_object(row, where)
        _require_column(where, text_column, row)
    fields = {}
    for field, column in (("text", text_column), ("id", "id"), ("title", "title")):
        value = row.get(column)
        fields[field] = value.decode() if isinstance(value, bytes) else "" if value is None else str(value)
    return fields


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    text = line.decode("utf-8")
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}, an object with a text column is needed")
    return row
