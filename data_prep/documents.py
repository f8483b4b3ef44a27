"""Clean documents, drop what is short or repeated, and split the rest into train and validation.

Two walks over the input parts, each parallel over parts: the first leaves keys of every document in `.keys/`,
which are compared in between; the second writes what is kept. A whole document goes to one side of the split,
a book too; neither side is ever left empty.
"""

import argparse
import re
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.files import sha256_of, sole_writer, whole_file
from data_prep.near_duplicates import Repeats, make_keys, save_keys, text_hash
from data_prep.parallel import default_workers, ordered_map
from data_prep.parts import (
    INDEX_NAME,
    Batch,
    Document,
    Stage,
    convert,
    encode_document,
    forget_if_empty,
    load_index,
    open_folder,
    part_paths,
    read_part,
    summary,
)
from data_prep.progress import progress

RULES = 2  # raise when the same input would give other documents
KEYS_FOLDER = ".keys"
OUTPUTS = ("train", "validation")
TRAIN, VALIDATION, TOO_SHORT, TOO_LONG, DUPLICATE, NEAR_DUPLICATE = range(6)
REASONS = {
    TOO_SHORT: "too_short",
    TOO_LONG: "too_long",
    DUPLICATE: "duplicate",
    NEAR_DUPLICATE: "near_duplicate",
}
EXAMPLE = """example:
  python -m data_prep documents work/wikipedia work/books --out work/documents --validation-share 0.01

The order of the folders matters: of repeated documents the first in input order is kept.
The split goes by a hash of the cleaned text of a whole document: books, few and long, are never cut in two.
At least one document is held out and one is left for training, whatever the share.
Interrupted, the same command goes on; the documents are the same bytes for any number of workers.
"""

_REMOVED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\ue000-\uf8ff\U000f0000-\U0010ffff]"
)
# each pattern begins with a class or a literal, which the re module looks for at hundreds of MB/s
_LINE_ENDS = re.compile("[\r\x0b\x0c\x85\u2028\u2029]\n?")
_OTHER_SPACES = re.compile("[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SPACES = re.compile("  +")
_EMPTY_LINES = re.compile("\n\n\n+")


@dataclass(frozen=True)
class Filter:
    """What is kept: lengths in characters of cleaned text (0: no limit), share of validation, similarity."""

    min_characters: int = 100
    max_characters: int = 0
    validation_share: float = 0.01
    similarity: float = 0.8

    def __post_init__(self) -> None:
        if self.min_characters < 1 or (self.max_characters and self.max_characters < self.min_characters):
            raise ValueError(
                "--min-characters must be at least 1 and --max-characters 0 or not below it, "
                f"got {self.min_characters} and {self.max_characters}"
            )
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"--validation-share must be in [0, 1), got {self.validation_share}")
        if not 0.5 <= self.similarity <= 1:
            raise ValueError(
                f"--similarity must be in [0.5, 1], got {self.similarity}; 1: exact repeats only"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m data_prep documents`."""
    default = Filter()
    parser.epilog = EXAMPLE
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of documents")
    parser.add_argument("--out", type=Path, required=True, help="folder for train and validation documents")
    add = partial(parser.add_argument, metavar="N")
    add(
        "--min-characters",
        type=int,
        default=default.min_characters,
        help="drop shorter (default: %(default)s)",
    )
    add("--max-characters", type=int, default=default.max_characters, help="drop longer (default: 0, none)")
    add(
        "--validation-share",
        type=float,
        default=default.validation_share,
        help="share held out for validation, of documents, not of their text; 0 to 1 (default: %(default)s; "
        "above 0 at least one document; 0: none)",
    )
    add(
        "--similarity",
        type=float,
        default=default.similarity,
        help="Jaccard similarity of word 5-grams from which a document is a near-duplicate, 0.5 to 1 "
        "(default: %(default)s; 1: exact repeats only)",
    )
    add("--workers", type=int, default=default_workers(), help="processes (default: cores, %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Clean, deduplicate and split; returns 0. ValueError or OSError for folders that cannot be read."""
    rules = Filter(args.min_characters, args.max_characters, args.validation_share, args.similarity)
    stage = Stage(
        name="documents",
        out=args.out,
        inputs=[_identity(folder) for folder in args.folders],
        settings={"rules": RULES, **vars(rules)},
        command=" ".join(["python -m data_prep documents", *(folder.name for folder in args.folders)]),
        outputs=OUTPUTS,
    )
    with sole_writer(args.out):
        index = open_folder(stage) or _work(stage, args.folders, rules, args.workers)
    print(summary(index))
    return 0


def _identity(folder: Path) -> dict[str, Any]:
    load_index(folder)
    return {"name": folder.resolve().name, "sha256_of_index": sha256_of(folder / INDEX_NAME)}


def _work(stage: Stage, folders: list[Path], rules: Filter, workers: int) -> dict[str, Any]:
    parts = [path for folder in folders for path in part_paths(folder)]
    if not parts:
        raise ValueError(f"no documents in {', '.join(map(str, folders))}: give folders that hold some")
    keys_folder = stage.out / KEYS_FOLDER
    keys_folder.mkdir(exist_ok=True)
    _make_all_keys(parts, keys_folder, rules, workers)
    try:
        fates = _all_fates(parts, keys_folder, rules)
    except ValueError:  # what the user mends is input or settings, and those may then use the same folder
        shutil.rmtree(keys_folder)
        forget_if_empty(stage.out)
        raise
    total_bytes = sum(path.stat().st_size for path in parts)
    index = convert(stage, zip(parts, fates, strict=True), extract_part, workers, total_bytes)
    shutil.rmtree(keys_folder)
    return index


def _make_all_keys(parts: list[Path], keys_folder: Path, rules: Filter, workers: int) -> None:
    tasks = [
        (number, path) for number, path in enumerate(parts) if not _fates_path(keys_folder, number).is_file()
    ]
    with progress("documents: keys", sum(path.stat().st_size for _, path in tasks)) as advance:
        for done in ordered_map(partial(keep_part_keys, folder=keys_folder, rules=rules), tasks, workers):
            advance(done)


def keep_part_keys(task: tuple[int, Path], folder: Path, rules: Filter) -> int:
    """Write the keys of one part and, last, what its own text decides of each document; returns its bytes."""
    number, path = task
    fates: list[int] = []
    save_keys(folder, number, make_keys(_kept_texts(path, rules, fates)))
    with whole_file(_fates_path(folder, number)) as file:
        file.write(bytes(fates))
    return path.stat().st_size


def _kept_texts(path: Path, rules: Filter, fates: list[int]) -> Iterator[str]:
    """Cleaned texts; "" for those too short or too long. Appends the fate of each to `fates`."""
    for document in read_part(path):
        text = clean(document["text"])
        fates.append(fate_of(text, rules))
        yield text if fates[-1] in (TRAIN, VALIDATION) else ""


def fate_of(text: str, rules: Filter) -> int:
    """What a document's own cleaned text decides: too short, too long, train or validation."""
    if len(text) < rules.min_characters:
        return TOO_SHORT
    if rules.max_characters and len(text) > rules.max_characters:
        return TOO_LONG
    return VALIDATION if text_hash(text) < rules.validation_share * 2**64 else TRAIN


def _fates_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.fates"


def _all_fates(parts: list[Path], keys_folder: Path, rules: Filter) -> list[npt.NDArray[np.uint8]]:
    """The fate of every document of every part (uint8), once repeats are known."""
    by_part = [np.fromfile(_fates_path(keys_folder, number), np.uint8) for number in range(len(parts))]
    fates = np.concatenate(by_part) if by_part else np.empty(0, np.uint8)
    repeats = Repeats(keys_folder, [len(part) for part in by_part])
    repeats.alive[:] = fates <= VALIDATION
    fates[repeats.drop_exact()] = DUPLICATE
    if rules.similarity < 1:
        fates[repeats.drop_near(rules.similarity)] = NEAR_DUPLICATE
    if rules.validation_share:
        _fill_both_splits(fates, repeats)
    return np.split(fates, repeats.first[1:-1])


def _fill_both_splits(fates: npt.NDArray[np.uint8], repeats: Repeats) -> None:
    """Of the kept documents that with the smallest hash is held out, and that with the largest never is.

    So the split still goes by text alone. ValueError for a single document, which cannot be on both sides.
    """
    kept = int(repeats.alive.sum())
    if kept == 1:
        raise ValueError(
            "one document is left, which cannot be in train and validation both; "
            "give more documents, or --validation-share 0"
        )
    if kept:
        smallest, largest = repeats.extremes()
        fates[smallest], fates[largest] = VALIDATION, TRAIN


def extract_part(task: tuple[Path, npt.NDArray[np.uint8]]) -> Batch:
    """The cleaned documents of one part that are kept, by split, and the reasons of the others."""
    path, fates = task
    batch = Batch(input_bytes=path.stat().st_size)
    lines: dict[int, list[bytes]] = {TRAIN: [], VALIDATION: []}
    for document, fate in zip(read_part(path), fates.tolist(), strict=True):
        batch.seen += 1
        if fate in lines:
            lines[fate].append(encode_document(_cleaned(document)))
        else:
            batch.dropped[REASONS[fate]] += 1
    batch.kept = {name: (b"".join(lines[i]), len(lines[i])) for i, name in enumerate(OUTPUTS)}
    return batch


def _cleaned(document: Document) -> Document:
    title = clean(document["title"]).replace("\n", " ")
    return {**document, "title": title, "text": clean(document["text"])}


def clean(text: str) -> str:
    """Unicode NFC without control, private and direction characters; single spaces, at most one empty line.

    Cleaning a cleaned text changes nothing.
    """
    text = _LINE_ENDS.sub("\n", text)
    text = unicodedata.normalize("NFC", _REMOVED.sub("", text))
    text = _SPACES.sub(" ", _OTHER_SPACES.sub(" ", text))
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return _EMPTY_LINES.sub("\n\n", text).strip()
