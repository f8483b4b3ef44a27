"""Scoring, top to bottom: the scheduled teacher walks the training order once and writes what it says.

Each sample meets only the checkpoint that will teach it, so that any number of teachers costs the passes and bytes of one.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from distill import distributed
from distill.build import first_schedule
from distill.config import Config
from distill.data import Samples, batches_at
from distill.models import head_of, quiet_transformers
from distill.schedule import Schedule
from distill.score_shards import Shards
from distill.signals import Cancelled, Stopped, stop_signal
from distill.targets.codecs import Codec, check_codec, make_codec
from distill.targets.header import Entry, Header, Range, Scorer
from distill.targets.heads import head_name, save_head
from distill.targets.writer import Journal, finished
from distill.teacher import Teacher
from distill.trajectory.audit.verdicts import refuse_bad_steps
from distill.trajectory.manifest import Manifest
from distill.trajectory.nodes import Channel, load_alike

log = logging.getLogger(__name__)
SAMPLES_A_SHARD, SAMPLES_OF_HIDDEN = 1024, 64  # some 10 to 500 MB at 512 to 2048 tokens
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
    if config.teacher.tokenizer:
        raise ValueError(
            "teacher.tokenizer is set: targets speak of the shards' tokens, which this teacher does not know: make "
            "shards with the teacher's tokenizer, and leave it out"
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
        own = share_of(needed, part)
        rounds = list(rounds_of(own, done, world.size))
        teacher = Teacher(manifest, config, samples.tokenizer, samples.sequence_length, world)
        at_end.callback(teacher.close)
        shards = Shards(config, samples, header, teacher, world, out)
        at_end.callback(shards.close)
        batches = batches_at(samples, shards.positions(rounds))
        progress = Progress(rounds, world.is_main)
        for places, ahead in with_upcoming(rounds):
            try:
                teacher.use(places[0].checkpoint, ahead)
            except Cancelled:
                raise Stopped(max(ranks.gather(stop_signal())), progress.shards, "shard") from None
            if codec.is_exact and world.is_main:
                keep_head(out, header, places[0].checkpoint, teacher)
            entry = ranks.together(partial(shards.make, places, batches))
            told = ranks.gather((entry, stop_signal()))
            for each, _ in told:
                if journal and each:
                    journal.add(each)
            progress.add(places)
            if stop := max(signal for _, signal in told):
                raise Stopped(stop, progress.shards, "shard")
        if codec.is_exact:  # a head that somebody has deleted, whose shards are all there
            for step in ranks.gather(headless(out, own) if world.is_main else None)[0]:
                teacher.use(step)
                if world.is_main:
                    keep_head(out, header, step, teacher)
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


def with_upcoming(rounds: Sequence[list[Range]]) -> Iterator[tuple[list[Range], list[int]]]:
    """Each round, and the teacher steps that come after its own, in order, where they change."""
    stages = [(step, list(same)) for step, same in groupby(rounds, lambda places: places[0].checkpoint)]
    for number, (_, same) in enumerate(stages, 1):
        ahead = [step for step, _ in stages[number:]]
        for places in same:
            yield places, ahead


def keep_head(out: Path, header: Header, step: int, teacher: Teacher) -> None:
    """Store the head that makes logits of this teacher's hidden states, once."""
    assert teacher.model is not None, "use() comes first"
    if not (out / head_name(step)).exists():
        save_head(out, step, header.checkpoints[step], head_of(teacher.model))


def headless(out: Path, ranges: Sequence[Range]) -> list[int]:
    """Teacher steps of these ranges whose head is not there."""
    return sorted({r.checkpoint for r in ranges if not (out / head_name(r.checkpoint)).exists()})


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
