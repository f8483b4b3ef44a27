"""Scoring, top to bottom: the scheduled teacher walks the training order once and writes what it says.

Each sample meets only the checkpoint that will teach it, so that any number of teachers costs the passes and bytes of one.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill import distributed
from distill.build import first_schedule
from distill.config import Config
from distill.data import Batch, Samples, batches_at
from distill.distributed import World
from distill.models import Rows, head_of, quiet_transformers
from distill.sample_order import Ints
from distill.schedule import Schedule
from distill.signals import Stopped, stop_signal
from distill.targets.codecs import Codec, check_codec, make_codec
from distill.targets.encode import Kept, keep, split, to_bytes, uniforms
from distill.targets.header import BadTargets, Entry, Header, Range, Scorer
from distill.targets.heads import head_name, save_head
from distill.targets.writer import Journal, compress, finished, member_name, write_shard
from distill.teacher import Teacher
from distill.trajectory.audit.verdicts import refuse_bad_steps
from distill.trajectory.manifest import Manifest
from distill.trajectory.nodes import Channel, load_alike

log = logging.getLogger(__name__)
SAMPLES_A_SHARD, SAMPLES_OF_HIDDEN = 1024, 64  # some 10 to 500 MB at 512 to 2048 tokens
MOST_SEQUENCES = 32  # a forward, where micro_batch_size leaves it open
LOG_SECONDS = 10.0


def score(
    config: Config, out: Path, codec: Codec, part: tuple[int, int] = (0, 1), steps: int = 0, a_shard: int = 0
) -> dict[str, Any]:
    """Score part `part` (number, of how many) of the samples of `config` into the folder `out`, as far as nobody has.

    steps: of the run's steps, to be scored; 0: all. a_shard: samples of a shard; 0: by codec.
    Returns what the folder holds afterwards.

    Raises:
        Stopped: a signal came; what is finished stays.
        ValueError: (and its kinds) what can't be scored, before the first sample.
    """
    if not config.teacher.trajectory:
        raise ValueError("teacher.trajectory is not set: name the teacher that is to be scored")
    if config.teacher.ensemble > 1:
        raise ValueError(
            f"teacher.ensemble={config.teacher.ensemble}: targets are of one checkpoint a sample, leave it out"
        )
    quiet_transformers()
    world = distributed.start()
    ranks = Channel(range(world.size), world.rank)
    samples = Samples(config.data, "train", config.seed, shuffle=True)
    check_codec(codec, samples.tokenizer.vocab_size)
    manifest = load_alike(config.teacher.trajectory, world)
    schedule = scorable_schedule(config, manifest)
    header = make_header(config, codec, samples, manifest, schedule, a_shard)
    needed = list(header.ranges(0, min(steps or config.steps, config.steps) * config.batch_size))
    with ExitStack() as at_end:
        journal = ranks.together(
            lambda: at_end.enter_context(Journal(out, header, part)) if world.is_main else None
        )
        done = ranks.gather(finished(out) if world.is_main else None)[0]
        rounds = list(rounds_of(share_of(needed, part), done, world.size))
        teacher = Teacher(manifest, config, samples.tokenizer, samples.sequence_length, world)
        at_end.callback(teacher.close)
        shards = Shards(config, samples, header, teacher, world, out)
        at_end.callback(shards.close)
        batches = batches_at(samples, shards.positions(rounds))
        progress = Progress(rounds, world.is_main)
        for number, places in enumerate(rounds):
            teacher.use(places[0].checkpoint, upcoming(rounds[number:]))
            if codec.is_exact and world.is_main:
                keep_head(out, places[0].checkpoint, teacher)
            entry = ranks.together(partial(shards.make, places, batches))
            told = ranks.gather((entry, stop_signal()))
            for each, _ in told:
                if journal and each:
                    journal.add(each)
            progress.add(places)
            if stop := max(signal for _, signal in told):
                raise Stopped(stop, progress.shards, "shard")
        distributed.barrier(world)  # a rank that only reads sees all that was written
    return summary(out, needed)


def codec_for(config: Config, name: str, k: int | None, p: float | None, draws: int | None) -> Codec:
    """The codec of this name at the run's temperature; None for a setting's default.

    Raises ValueError for a temperature that changes, at which nothing but hidden states can be stored.
    """
    ramp = config.objective.temperature
    values = {value for _, value in ramp} if isinstance(ramp, list) else {ramp}
    if len(values) > 1 and name != "hidden":
        raise ValueError(
            f"objective.temperature={ramp} changes, targets of codec {name} are made at one temperature: set one, or score "
            "with --codec hidden"
        )
    return make_codec(name, values.pop(), k, p, draws)


def scorable_schedule(config: Config, manifest: Manifest) -> Schedule:
    """Who teaches which sample. Raises ValueError where that is not known yet."""
    schedule = first_schedule(config, manifest)
    if schedule.waiting:
        raise ValueError(
            f"schedule.kind={config.schedule.kind} follows the student's progress, which nobody knows before it trains: "
            "choose another kind to be scored"
        )
    if schedule.unsettled:
        raise ValueError(
            f"{manifest.url}: the teacher's run has not ended, and teacher.unfinished={config.teacher.unfinished} leaves open "
            "who teaches: score with teacher.unfinished=refuse and steps that are there"
        )
    refuse_bad_steps(manifest, (stage.checkpoint for stage in schedule.stages))
    return schedule


def make_header(
    config: Config, codec: Codec, samples: Samples, manifest: Manifest, schedule: Schedule, a_shard: int
) -> Header:
    steps = sorted({stage.checkpoint for stage in schedule.stages})
    return Header(
        codec=codec,
        vocab_size=samples.tokenizer.vocab_size,
        samples=samples.question,
        tokenizer_sha256=samples.tokenizer.sha256,
        teacher_dtype=config.teacher.dtype,
        stages=tuple((stage.first_sample, stage.checkpoint) for stage in schedule.stages),
        total_samples=schedule.total_samples,
        samples_per_shard=a_shard or (SAMPLES_OF_HIDDEN if codec.is_exact else SAMPLES_A_SHARD),
        available=tuple(manifest.checkpoints),
        losses=manifest.losses,
        checkpoints={step: Scorer(manifest.checkpoints[step].weights) for step in steps},
        command=shlex.join(sys.argv),
    )


# ------------------------------------------------------------------------------------------------ who scores what


def share_of(ranges: Sequence[Range], part: tuple[int, int]) -> Sequence[Range]:
    """The ranges of one part: neighbours, so that a part reads few checkpoints.

    Raises ValueError for a part that is none.
    """
    number, parts = part
    if not 0 <= number < parts:
        raise ValueError(f"--part must be I/N with I in 0..N-1, got {number}/{parts}")
    return ranges[len(ranges) * number // parts : len(ranges) * (number + 1) // parts]


def rounds_of(ranges: Sequence[Range], done: dict[int, Entry], ranks: int) -> Iterator[list[Range]]:
    """What the ranks score at a time: a shard each, of one checkpoint, of those that are not done."""
    todo = [place for place in ranges if place.first not in done]
    while todo:
        same = [place for place in todo[:ranks] if place.checkpoint == todo[0].checkpoint]
        yield same
        todo = todo[len(same) :]


def upcoming(rounds: Sequence[Sequence[Range]]) -> list[int]:
    """Teacher steps of the rounds after the first, in order, where they change."""
    steps = [places[0].checkpoint for places in rounds]
    return [step for before, step in pairwise(steps) if step != before]


def keep_head(out: Path, step: int, teacher: Teacher) -> None:
    """Store the head that makes logits of this teacher's hidden states, once."""
    assert teacher.model is not None, "use() comes first"
    if not (out / head_name(step)).exists():
        save_head(out, step, head_of(teacher.model))


class Shards:
    """This rank's shards: the micro-batches that it reads, and what it makes of them."""

    def __init__(
        self, config: Config, samples: Samples, header: Header, teacher: Teacher, world: World, out: Path
    ) -> None:
        self.samples, self.header, self.teacher, self.out = samples, header, teacher, out
        self.rank, self.device = world.rank, world.device
        self.micro = config.micro_batch_size or min(max(1, config.batch_size // world.size), MOST_SEQUENCES)
        self.is_collective = config.teacher.zero_stage == 3
        self._packers = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="pack"
        )  # beside the next forward

    def _own(self, places: Sequence[Range]) -> Range:
        """This rank's shard of a round; an empty range if there is none for it."""
        return places[self.rank] if self.rank < len(places) else Range(0, 0, places[0].checkpoint)

    def _starts(self, places: Sequence[Range]) -> range:
        """First samples of this rank's micro-batches in a round.

        Under ZeRO 3 all ranks go forward together, those that have nothing left beyond the end of their shard.
        """
        own = self._own(places)
        length = max(map(len, places)) if self.is_collective else len(own)
        return range(own.first, own.first + length, self.micro)

    def positions(self, rounds: Sequence[Sequence[Range]]) -> Iterator[Ints]:
        """Of all micro-batches that this rank reads, in order."""
        for places in rounds:
            after = self._own(places).after
            for first in self._starts(places):
                yield (
                    np.arange(first, min(first + self.micro, after))
                    if first < after
                    else np.zeros(1, np.int64)
                )

    def make(self, places: Sequence[Range], batches: Iterator[Batch]) -> Entry | None:
        """Score this rank's shard of a round and write it; None if there is none for it."""
        own, num_rows = self._own(places), 0
        packing: list[Future[list[Member]]] = []
        for first in self._starts(places):
            batch = next(batches).to(self.device)
            if first >= own.after:
                self.teacher.rows(batch.inputs, batch.rows_N[:0])
                continue
            said = self.teacher.rows(batch.inputs, batch.rows_N)
            num_rows += len(batch.rows_N)
            positions_B = np.arange(first, first + len(batch.sample_ids))
            packing.append(self._pack(positions_B, batch, said, own.checkpoint))
        if not len(own):
            return None
        members = [member for future in packing for member in future.result()]
        raw = sum(member.raw for member in members)
        return write_shard(
            self.out, own, [(member.name, member.content) for member in members], num_rows, raw
        )

    def _pack(self, positions_B: Ints, batch: Batch, said: Rows, step: int) -> Future[list[Member]]:
        """Have the members of a micro-batch made. Raises BadTargets if the teacher says what is no number."""
        codec, vocab_size = self.header.codec, self.header.vocab_size
        epochs, ids = (positions_B // len(self.samples)).tolist(), batch.sample_ids.tolist()
        in_sample_N = batch.rows_N // self.samples.sequence_length
        counts_B = torch.bincount(in_sample_N, minlength=len(ids)).tolist()
        uniform_NS = None
        if codec.draws:
            keys = zip(epochs, ids, counts_B, strict=True)
            uniform_NS = np.concatenate([uniforms(self.samples.seed, *key, codec.draws) for key in keys])
        try:
            kept = keep(codec, said.hidden_ND, said.head, batch.labels_N, vocab_size, uniform_NS)
        except ValueError as error:
            where = f"samples {positions_B[0]} to {positions_B[-1]} of the training order"
            raise BadTargets(f"teacher step {step}, {where}: {error}") from error
        names = [member_name(epoch, sample) for epoch, sample in zip(epochs, ids, strict=True)]
        return self._packers.submit(_members, names, split(kept, counts_B), vocab_size)

    def close(self) -> None:
        self._packers.shutdown(cancel_futures=True)


class Member(NamedTuple):
    """A sample's file in a shard, and the bytes of it before compression."""

    name: str
    content: bytes
    raw: int


def _members(names: Sequence[str], kept_B: Sequence[Kept | Tensor], vocab_size: int) -> list[Member]:
    payloads = [to_bytes(kept, vocab_size) for kept in kept_B]
    return [Member(name, compress(each), len(each)) for name, each in zip(names, payloads, strict=True)]


# ------------------------------------------------------------------------------------------------ what came of it


class Progress:
    """Shards done, speed and time left, in the log of the main rank every few seconds."""

    def __init__(self, rounds: Sequence[Sequence[Range]], is_main: bool) -> None:
        self.shards = 0
        self._rounds, self._is_main = rounds, is_main
        self._total = sum(len(place) for places in rounds for place in places)
        self._samples, self._start, self._told = 0, time.monotonic(), 0.0

    def add(self, places: Sequence[Range]) -> None:
        """Count a round."""
        self.shards += len(places)
        self._samples += sum(map(len, places))
        seconds = time.monotonic() - self._start
        is_last = self._samples == self._total
        if not self._is_main or not (is_last or seconds - self._told > LOG_SECONDS):
            return
        self._told, speed = seconds, self._samples / seconds
        left = (self._total - self._samples) / speed / 60
        log.info(
            "scored %d of %d shards, teacher step %d, %.1f samples/s, %.0f min left",
            self.shards, sum(map(len, self._rounds)), places[0].checkpoint, speed, left,
        )  # fmt: skip


def summary(out: Path, needed: Sequence[Range]) -> dict[str, Any]:
    """What the folder holds of what was asked for; bytes are those of a counted token."""
    done = finished(out)
    there = [(place, done[place.first]) for place in needed if place.first in done]
    rows = sum(entry.rows for _, entry in there)
    return {
        "shards": len(there),
        "missing": len(needed) - len(there),
        "samples": sum(len(place) for place, _ in there),
        "tokens": rows,
        "bytes_a_token": round(sum(entry.payload_bytes for _, entry in there) / max(rows, 1), 2),
        "stored_bytes_a_token": round(sum(entry.bytes for _, entry in there) / max(rows, 1), 2),
    }
