"""A teacher that was scored beforehand: what it said is read beside the batches, and belongs to them or is refused."""

from __future__ import annotations

import logging
import time

from distill.config import Config
from distill.data import Batch, Samples
from distill.distributed import World, agree_on_stop, from_main
from distill.kernels import SparseTargets
from distill.models import Rows
from distill.objectives.soft_labels import refuse_unserved
from distill.schedule import Schedule, make_schedule
from distill.signals import Stopped, stop_signal
from distill.targets.header import BadTargets, Header
from distill.targets.heads import check_head, load_head
from distill.targets.reader import TargetReader
from distill.trajectory.manifest import load_manifest

log = logging.getLogger(__name__)
WAIT_SECONDS = 2.0  # between looks at targets that are being scored


class StoredTeacher:
    """The targets in `config.teacher.targets`, for every sample of the run those of the checkpoint that it names.

    No model is swapped or asked: swap_seconds and work are 0 and None.
    bytes_read: of the targets' shards that the run has come to, each once, as all processes of a node share what its
    first reader has brought into memory.
    """

    swap_seconds, work = 0.0, None

    def __init__(self, config: Config, samples: Samples, world: World) -> None:
        """Has `samples` read the targets with each batch.

        Raises:
            BadTargets: they are of other samples, masks or teachers, some lack or are damaged.
            ValueError: the objective needs what they don't hold.
        """
        self._waits = config.teacher.unfinished == "wait"
        self.reader, self.world = TargetReader(config.teacher.targets, self._waits), world
        self.header = self.reader.header
        refuse_foreign(self.header, samples)
        refuse_unserved(config.objective, self.header.codec, self.header.url)
        self.schedule = schedule_of(config, self.header)
        if config.teacher.trajectory:
            refuse_other_teacher(self.header, self.schedule, config.teacher.trajectory)
        self.reader.refuse_damaged(0, config.total_samples)
        if not self._waits:
            refuse_missing(self.reader, config.total_samples)
            if self.header.codec.is_exact:
                for step in teaching(self.schedule, config.total_samples):
                    check_head(self.header, step)
        self._ready = (
            0 if self._waits else config.total_samples
        )  # samples whose targets are known to be there
        self._step = -1
        self.bytes_read, self._counted = 0, 0  # the latter: samples whose shards are in bytes_read
        samples.targets = self.reader

    def settle(self, schedule: Schedule, consumed: int) -> Schedule:
        """The same schedule, once the targets of the step after `consumed` samples are there. Collective.

        A stop signal makes it return before.
        """
        after, told = min(consumed + schedule.batch_size, schedule.total_samples), False
        while from_main(int(self.world.is_main and self._lacks(consumed, after)), self.world):
            if agree_on_stop(stop_signal(), self.world):
                return schedule
            if not told:
                log.info("waiting for the targets of samples %d to %d", consumed, after - 1)
            told = True
            time.sleep(WAIT_SECONDS)
        self._ready = after
        return schedule

    def _lacks(self, first: int, after: int) -> bool:
        return self.reader.first_missing(first, after) is not None

    def follow(self, schedule: Schedule, consumed: int) -> float:
        """Be the teacher of the sample after `consumed` samples. Seconds that this took.

        Raises Stopped where a signal came while its targets were waited for.
        """
        if consumed >= self._ready:
            raise Stopped(agree_on_stop(stop_signal(), self.world), consumed // schedule.batch_size)
        start, step = time.perf_counter(), schedule.checkpoint_at(consumed)
        after = min(consumed + schedule.batch_size, schedule.total_samples)
        for place in self.header.ranges(max(consumed, self._counted), after):
            self.bytes_read, self._counted = self.bytes_read + self.reader.size_of(place), place.after
        if self.header.codec.is_exact and step != self._step:
            self._head = load_head(self.header, step, self.world.device)
        self._step = step
        return time.perf_counter() - start

    def await_next(self, schedule: Schedule, consumed: int) -> bool:
        """No weights are to come; `settle` waits for targets."""
        return True

    def width(self, step: int) -> int:
        """Of the hidden states of the checkpoint of teacher step `step`; 0 where none are stored."""
        if not self.header.codec.is_exact:
            return 0
        return load_head(self.header, step, self.world.device).weight_VD.shape[1]

    def signal(self, batch: Batch) -> Rows | SparseTargets:
        """What the teacher has said about this batch."""
        assert batch.targets is not None, "the samples read them"
        if isinstance(batch.targets, SparseTargets):
            return batch.targets
        return Rows(batch.targets, self._head)

    def close(self) -> None:
        """Nothing works beside the loop."""


def refuse_foreign(header: Header, samples: Samples) -> None:
    """Raises BadTargets where targets were made of other samples, in another order or with another mask or tokenizer."""
    now, tokenizer = samples.question, samples.tokenizer
    differences = [
        f"{key}: targets {_short(header.samples.get(key))}, this run {_short(now[key])}"
        for key in now
        if header.samples.get(key) != now[key]
    ]
    if header.tokenizer_sha256 != tokenizer.sha256 or header.vocab_size != tokenizer.vocab_size:
        differences.append(
            f"tokenizer: targets {_short(header.tokenizer_sha256)} of {header.vocab_size} tokens, "
            f"this run {_short(tokenizer.sha256)} of {tokenizer.vocab_size}"
        )
    if differences:
        raise BadTargets(
            f"{header.url} holds targets of other samples or masks than this run asks about; go back to these settings, or "
            "score again:\n  " + "\n  ".join(differences)
        )


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value


def schedule_of(config: Config, header: Header) -> Schedule:
    """The run's own schedule, made as it was for scoring.

    Raises:
        BadTargets: for some samples it names another checkpoint than the one that scored them, or the targets end
            before the run.
    """
    available = list(header.available)
    schedule = make_schedule(config.schedule, available, header.losses, config.steps, config.batch_size)
    total = schedule.total_samples
    if total > header.total_samples:
        raise BadTargets(
            f"{header.url} was scored for {header.total_samples} samples, this run needs {total} "
            f"({config.steps} steps of {config.batch_size}): train shorter, or score for this run"
        )
    starts = {stage.first_sample for stage in schedule.stages} | {first for first, _ in header.stages}
    for first in sorted(start for start in starts if start < total):
        named, scored = schedule.checkpoint_at(first), header.checkpoint_at(first)
        if named != scored:
            raise BadTargets(
                f"the schedule names teacher step {named} from sample {first} on, {header.url} has targets of step {scored} "
                f"there; scored were [first sample, teacher step] {[list(stage) for stage in header.stages]}: set the "
                "schedule that was scored, or score this one"
            )
    return schedule


def teaching(schedule: Schedule, total: int) -> list[int]:
    """The teacher steps of the first `total` samples, rising."""
    return sorted({stage.checkpoint for stage in schedule.stages if stage.first_sample < total})


def refuse_other_teacher(header: Header, schedule: Schedule, trajectory: str) -> None:
    """Raises BadTargets unless the checkpoints that teach are, in `trajectory`, those that scored."""
    known = load_manifest(trajectory).checkpoints
    for step in sorted({stage.checkpoint for stage in schedule.stages}):
        scored, now = header.checkpoints[step].weights, known[step].weights if step in known else ()
        if scored != now:
            found = f"has sha256 {now[0][:12]}" if now else "is not there"
            raise BadTargets(
                f"{header.url} was scored by a teacher step {step} of sha256 {scored[0][:12]}, in {trajectory} that step "
                f"{found}: use the targets' own teacher, or score again"
            )


def refuse_missing(reader: TargetReader, total: int) -> None:
    """Raises BadTargets unless all targets of the first `total` samples are there."""
    if place := reader.first_missing(0, total):
        raise BadTargets(
            f"{reader.folder} has no targets of samples {place.first} to {place.after - 1}, of {total} that this run needs: "
            "let `distill score` end (the same command goes on), or set teacher.unfinished=wait to learn while it runs"
        )
