"""The shards stage: documents to fixed-length token sequences in tar shards, in parallel.

Processes take blocks of documents and give back token ids. Here these are strung together, in order, in a
spool file for each shard; a full spool goes back to a process, which writes the tar. A finished shard is a
line in the journal, with the place in the documents where the next one begins. A run may be killed anywhere:
it repeats what came after the last line.
"""

import argparse
import errno
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.blocks import Block, Encoded, blocks_of_part, encode_block
from data_prep.encoding import copy_tokenizer, load_tokenizer
from data_prep.files import remove_temporary_files
from data_prep.journal import Journal, documents_digest
from data_prep.parallel import default_workers, ordered_map
from data_prep.parts import load_index, part_paths
from data_prep.progress import progress
from data_prep.shards import Shard, ShardIndex, Split, TokenizerInfo, write_shard
from data_prep.tar_records import RecordLayout

SPLITS = ("train", "validation")
MAX_SEQUENCE_LENGTH = 1 << 20
MAX_SHARD_MEGABYTES = 4096
# A process more costs a start and has its words to learn: it must have this much to do.
BYTES_PER_WORKER = 24 << 20  # of JSON lines
_START = (0, 0, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m data_prep shards`."""
    parser.add_argument("documents", metavar="DOCUMENTS_DIR", help="folder made by the documents stage")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="folder made by the tokenizer stage"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--sequence-length", type=int, default=128, metavar="N", help="tokens (default 128)")
    parser.add_argument(
        "--shard-megabytes",
        type=int,
        default=64,
        metavar="MB",
        help="size of a shard, 10^6 bytes (default 64)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=default_workers(),
        metavar="N",
        help="processes at most (default: all cores)",
    )
    parser.epilog = (
        "example:\n  python -m data_prep shards work/documents --tokenizer work/tokenizer --out work/shards\n"
        "Any number of --workers gives the same bytes. After an interruption the same command goes on."
    )


@dataclass(frozen=True)
class Plan:
    """One run: what decides the bytes (`settings`, never the number of workers) and where things are."""

    blocks: dict[str, list[Block]]
    info: TokenizerInfo
    tokenizer: Path
    out: Path
    layout: RecordLayout
    samples_per_shard: int
    settings: dict[str, Any]
    counts: dict[str, Any]
    command: str


def run(args: argparse.Namespace) -> int:
    """Make the shards, or go on making them; ValueError says what is wrong with arguments or input."""
    plan = make_plan(args)
    plan.out.mkdir(parents=True, exist_ok=True)
    with Journal(plan.out, plan.settings, SPLITS) as journal:
        if journal.is_finished:
            print(f"shards: {plan.out} is complete", file=sys.stderr)
            return 0
        remove_temporary_files(plan.out)
        copy_tokenizer(plan.tokenizer, plan.out / "tokenizer")
        try:
            make_shards(plan, journal, args.workers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"{plan.out}: no space left; free some and run the same command, which goes on"
            ) from error
        finally:
            remove_temporary_files(plan.out)
        index = _index(plan, journal)
        index.save(plan.out)
    print(_summary(index, plan.out), file=sys.stderr)
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the arguments and cut the documents into blocks."""
    documents, tokenizer, out = Path(args.documents), Path(args.tokenizer), Path(args.out)
    _check_range("--sequence-length", args.sequence_length, 2, MAX_SEQUENCE_LENGTH)
    _check_range("--shard-megabytes", args.shard_megabytes, 1, MAX_SHARD_MEGABYTES)
    info = load_tokenizer(tokenizer).info
    layout = RecordLayout(args.sequence_length, info.dtype)
    blocks = {split: _blocks(documents, split, tokenizer) for split in SPLITS}
    if not blocks["train"]:
        raise ValueError(f"{documents} has no train documents: give the output folder of the documents stage")
    chosen = {"sequence_length": args.sequence_length, "shard_megabytes": args.shard_megabytes}
    index = load_index(documents)
    return Plan(
        blocks=blocks,
        info=info,
        tokenizer=tokenizer,
        out=out,
        layout=layout,
        samples_per_shard=max(1, args.shard_megabytes * 10**6 // layout.record_bytes),
        settings={**chosen, "tokenizer": info.sha256, "documents": documents_digest(index)},
        counts=index["counts"],
        command=(
            f"python -m data_prep shards {documents} --tokenizer {tokenizer} --out {out} "
            f"--sequence-length {args.sequence_length} --shard-megabytes {args.shard_megabytes}"
        ),
    )


def _check_range(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{option} {value}: a number from {low} to {high} expected")


def _blocks(documents: Path, split: str, tokenizer: Path) -> list[Block]:
    sizes = {part["name"]: part["json_bytes"] for part in load_index(documents)["parts"]}
    paths = part_paths(documents, split)
    parts = (blocks_of_part(path, split, n, sizes[path.name], tokenizer) for n, path in enumerate(paths))
    return [block for blocks in parts for block in blocks]


@dataclass(frozen=True)
class SpooledShard:
    """A full spool, to be made a tar."""

    spool: Path
    out: Path
    split: str
    number: int
    first_sample: int
    pad_id: int
    layout: RecordLayout
    end: tuple[int, int, int]


def make_shards(plan: Plan, journal: Journal, workers: int) -> None:
    """Write all shards that the journal does not have yet."""
    packers = {split: Packer(plan, split, journal.shards[split]) for split in SPLITS}
    todo = [block for split in SPLITS for block in plan.blocks[split] if packers[split].needs(block)]
    full: deque[SpooledShard] = deque()
    total = sum(block.num_bytes for blocks in plan.blocks.values() for block in blocks)
    todo_bytes = sum(block.num_bytes for block in todo)
    workers = min(workers, 1 + todo_bytes // BYTES_PER_WORKER)
    with progress("shards", total, initial=total - todo_bytes) as advance:
        for result in ordered_map(_work, _tasks(todo, full), workers):
            if isinstance(result, Shard):
                journal.add(result)
                continue
            packer = packers[result.block.split]
            packer.add(result)
            full.extend(packer.take_full(result.block == plan.blocks[result.block.split][-1]))
            advance(result.input_bytes)
    for spooled in full:
        journal.add(write_spooled(spooled))


def _tasks(blocks: list[Block], full: deque[SpooledShard]) -> Iterator[Block | SpooledShard]:
    """Blocks in order, and between them the spools that became full meanwhile."""
    for block in blocks:
        while full:
            yield full.popleft()
        yield block


def _work(task: Block | SpooledShard) -> Encoded | Shard:
    return encode_block(task) if isinstance(task, Block) else write_spooled(task)


def write_spooled(task: SpooledShard) -> Shard:
    """Make a tar of a spool and remove the spool."""
    tokens = np.memmap(task.spool, task.layout.numpy_dtype, "r")
    row = write_shard(
        task.out,
        task.split,
        task.number,
        tokens.reshape(-1, task.layout.sequence_length),
        first_sample=task.first_sample,
        pad_id=task.pad_id,
        layout=task.layout,
        end=task.end,
    )
    task.spool.unlink()
    return row


class Packer:
    """Strings the tokens of one split together into spools, each as long as a shard."""

    def __init__(self, plan: Plan, split: str, done: list[Shard]) -> None:
        self._plan = plan
        self._split = split
        self._number = len(done)
        self._first_sample = sum(shard.samples for shard in done)
        self._start = (done[-1].end or _START) if done else _START
        self._capacity = plan.samples_per_shard * plan.layout.sequence_length
        self._filled = 0  # tokens in the current spool
        self._full: list[SpooledShard] = []

    def needs(self, block: Block) -> bool:
        return (block.part, block.number) >= self._start[:2]

    def add(self, encoded: Encoded) -> None:
        """Take a block's tokens; behind the last one of a part the sequence is filled up with padding."""
        block, tokens = encoded.block, encoded.tokens
        place = self._start[2] if (block.part, block.number) == self._start[:2] else 0
        while place < len(tokens):
            taken = tokens[place : place + self._capacity - self._filled]
            place += len(taken)
            self._append(taken, (block.part, block.number, place))
        if block.is_last:
            missing = -self._filled % self._plan.layout.sequence_length
            padding = np.full(missing, self._plan.info.pad_id, self._plan.info.dtype)
            self._append(padding, (block.part + 1, 0, 0))

    def take_full(self, is_last: bool) -> list[SpooledShard]:
        """Spools that are ready to become tars; behind the last block also the one that is not full."""
        if is_last and self._filled:
            self._close()
        full, self._full = self._full, []
        return full

    @property
    def _spool(self) -> Path:
        return self._plan.out / f".{self._split}-{self._number:05d}.tokens.tmp"

    def _append(self, tokens: np.ndarray, end: tuple[int, int, int]) -> None:
        self._end = end
        if not len(tokens):
            return
        with open(self._spool, "ab" if self._filled else "wb") as file:
            file.write(np.ascontiguousarray(tokens, self._plan.layout.numpy_dtype).data)
        self._filled += len(tokens)
        if self._filled == self._capacity:
            self._close()

    def _close(self) -> None:
        plan = self._plan
        samples = self._filled // plan.layout.sequence_length
        self._full.append(
            SpooledShard(
                spool=self._spool,
                out=plan.out,
                split=self._split,
                number=self._number,
                first_sample=self._first_sample,
                pad_id=plan.info.pad_id,
                layout=plan.layout,
                end=self._end,
            )
        )
        self._number += 1
        self._first_sample += samples
        self._filled = 0


def _index(plan: Plan, journal: Journal) -> ShardIndex:
    return ShardIndex(
        sequence_length=plan.layout.sequence_length,
        dtype=plan.info.dtype,
        tokenizer=plan.info,
        splits={split: Split.of(shards) for split, shards in journal.shards.items()},
        documents=plan.counts,
        command=plan.command,
        settings=plan.settings,
    )


def _summary(index: ShardIndex, out: Path) -> str:
    parts = [
        f"{name}: {split.samples} sequences, {split.tokens} tokens, {len(split.shards)} shards"
        for name, split in index.splits.items()
    ]
    return f"shards: {'; '.join(parts)} in {out}"
