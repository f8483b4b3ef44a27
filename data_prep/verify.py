"""Check a shards folder from end to end, through stock `webdataset`, as any other reader would.

The only importer of `webdataset` here. Faults are printed one a line; exit code 0 without faults, 1 with.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import webdataset
from webdataset import tariterators

from data_prep.encoding import load_tokenizer
from data_prep.parallel import default_workers, ordered_map
from data_prep.progress import progress
from data_prep.shards import (
    CorruptShard,
    Shard,
    ShardIndex,
    TokenizerInfo,
    check_shard,
    shard_name,
)
from data_prep.tar_records import RecordLayout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m data_prep verify`."""
    parser.add_argument("shards", metavar="SHARDS_DIR", help="folder made by the shards stage")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="also check that the shards were made with this one"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes (default: all cores)"
    )
    parser.epilog = (
        "example:\n  python -m data_prep verify work/shards\nexit code: 0 all well, 1 faults, 2 no index"
    )


def run(args: argparse.Namespace) -> int:
    """Print a report; ValueError when there is no readable index to check against."""
    folder = Path(args.shards)
    index = ShardIndex.load(folder)
    faults = [*tokenizer_faults(folder, index, args.tokenizer), *folder_faults(folder, index)]
    faults += shard_faults(folder, index, args.workers)
    for fault in faults:
        print(f"FAULT {fault}")
    for name, split in index.splits.items():
        print(f"{name}: {len(split.shards)} shards, {split.samples} sequences, {split.tokens} tokens")
    print(f"{folder}: {len(faults)} faults" if faults else f"{folder}: all well")
    return 1 if faults else 0


def tokenizer_faults(folder: Path, index: ShardIndex, expected: str | None) -> Iterator[str]:
    """The copy beside the shards, and the tokenizer the caller expects, must be the one in the index."""
    copy = folder / "tokenizer"
    for path in [copy, Path(expected)] if expected else [copy]:
        try:
            found = load_tokenizer(path).info
        except (ValueError, OSError) as error:
            yield f"tokenizer: {error}"
            continue
        if found != index.tokenizer:
            yield f"tokenizer: {path} is {found}, the shards were made with {index.tokenizer}"


def folder_faults(folder: Path, index: ShardIndex) -> Iterator[str]:
    """Names and counts that the index must agree on with itself and with the folder."""
    for name, split in index.splits.items():
        if not split.samples:
            yield f"{name}: the split is empty; the documents stage fills it when --validation-share is above 0"
        for number, shard in enumerate(split.shards):
            if shard.name != shard_name(name, number):
                yield f"{shard.name}: stands where {shard_name(name, number)} belongs"
    listed = {shard.name for split in index.splits.values() for shard in split.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            yield f"{path.name}: not in the index; another reader would take it for a shard"
    if index.documents:
        counts = index.documents
        dropped = sum(counts["dropped"].values())
        if counts["in"] != counts["kept"] + dropped:
            yield f"documents: {counts['in']} in, but {counts['kept']} kept and {dropped} dropped"


@dataclass(frozen=True)
class _Task:
    folder: Path
    shard: Shard
    first_sample: int
    layout: RecordLayout
    tokenizer: TokenizerInfo


@dataclass
class _Report:
    faults: list[str] = field(default_factory=list)
    documents: int = 0
    num_bytes: int = 0


def shard_faults(folder: Path, index: ShardIndex, workers: int) -> list[str]:
    """Every shard read whole, in parallel; then the number of documents found in all of them."""
    faults: list[str] = []
    documents = 0
    tasks = list(_tasks(folder, index))
    with progress("verify", sum(task.shard.bytes for task in tasks)) as advance:
        for report in ordered_map(check_samples, tasks, workers):
            faults += report.faults
            documents += report.documents
            advance(report.num_bytes)
    kept = index.documents.get("kept", documents)
    if documents != kept and not faults:
        faults.append(f"documents: {kept} kept by the documents stage, {documents} ends found in the shards")
    return faults


def _tasks(folder: Path, index: ShardIndex) -> Iterator[_Task]:
    for split in index.splits.values():
        first = 0
        for shard in split.shards:
            yield _Task(folder, shard, first, index.layout, index.tokenizer)
            first += shard.samples


def check_samples(task: _Task) -> _Report:
    """Size, hash and every sample of one shard."""
    report = _Report(num_bytes=task.shard.bytes)
    try:
        check_shard(task.folder, task.shard)
    except CorruptShard as error:
        report.faults.append(f"{task.shard.name}: {error}")
        if not (task.folder / task.shard.name).is_file():
            return report
    try:
        _read_samples(task, report)
    except (
        Exception
    ) as error:  # whatever a damaged tar makes tarfile, numpy or webdataset raise is the finding
        report.faults.append(f"{task.shard.name}: webdataset cannot read it: {type(error).__name__}: {error}")
    return report


def _read_samples(task: _Task, report: _Report) -> None:
    samples = tokens = 0
    for sample in _webdataset(task.folder / task.shard.name):
        fault = _sample_fault(sample, task, task.first_sample + samples)
        if fault:
            report.faults.append(f"{task.shard.name}: {fault}")
            return
        ids = sample["tokens.npy"]
        samples += 1
        tokens += int(np.count_nonzero(ids != task.tokenizer.pad_id))
        report.documents += int(np.count_nonzero(ids == task.tokenizer.eos_id))
    if (samples, tokens) != (task.shard.samples, task.shard.tokens):
        report.faults.append(
            f"{task.shard.name}: {samples} samples and {tokens} tokens in the tar, "
            f"{task.shard.samples} and {task.shard.tokens} in the index"
        )


def _webdataset(path: Path) -> Iterator[dict]:
    """The stages of `WebDataset(path).decode()`, on a file that we close (it leaves its own open)."""
    with open(path, "rb") as stream:
        members = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        yield from webdataset.filters.decode()(tariterators.group_by_keys(members))


def _sample_fault(sample: dict, task: _Task, number: int) -> str | None:
    if sample["__key__"] != f"{number:09d}":
        return f"sample {sample['__key__']!r} stands where {number:09d} belongs"
    ids = sample.get("tokens.npy")
    if not isinstance(ids, np.ndarray):
        return f"sample {number} has no tokens.npy"
    expected = ((task.layout.sequence_length,), task.layout.numpy_dtype)
    if (ids.shape, ids.dtype) != expected:
        return f"sample {number} has shape and type {(ids.shape, ids.dtype)}, {expected} expected"
    if ids.max() >= task.tokenizer.vocab_size:
        return f"sample {number} has id {ids.max()}, the vocabulary has {task.tokenizer.vocab_size}"
    return None
