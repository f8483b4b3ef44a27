"""Who teaches, at what temperature, weight and learning rate: pure functions of the consumed samples.

Progressive distillation (Panigrahi et al., ICLR 2025, section 2): the student is taught by successive
checkpoints of one teacher run. Stages start on whole steps and are kept in samples, so that no layout of
ranks or micro-batches changes which checkpoint teaches which sample.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from distill.config import Config, OptimConfig, Ramp, ScheduleConfig


@dataclass(frozen=True)
class Stage:
    """From `first_sample` on, the teacher is its checkpoint of teacher step `checkpoint`."""

    first_sample: int
    checkpoint: int


@dataclass(frozen=True)
class Schedule:
    """Stages in order, over `total_samples` in batches of `batch_size`.

    `final_checkpoint` is the trajectory's last. The last `unsettled` stages name checkpoints that a teacher which is
    still training has yet to leave; what teaches them is settled when they start. `waiting`: checkpoints of an
    adaptive schedule that are still to teach, in their turn; the student's progress decides when, `advanced`
    writes it down.
    """

    stages: tuple[Stage, ...]
    total_samples: int
    batch_size: int
    final_checkpoint: int
    unsettled: int = 0
    waiting: tuple[int, ...] = ()

    def is_settled(self, stage: int) -> bool:
        """Whether the checkpoint of the stage with this index is decided."""
        return stage < len(self.stages) - self.unsettled

    def settle(self, stage: int, checkpoint: int) -> Schedule:
        """The same with `checkpoint` teaching the stage, for good."""
        stages = list(self.stages)
        stages[stage] = Stage(stages[stage].first_sample, checkpoint)
        return replace(self, stages=tuple(stages), unsettled=len(stages) - stage - 1)

    def stage_index(self, consumed: int) -> int:
        """Index of the stage that teaches the sample after `consumed` samples."""
        return bisect.bisect_right([s.first_sample for s in self.stages], consumed) - 1

    def checkpoint_at(self, consumed: int) -> int:
        """Teacher step that teaches the sample after `consumed` samples."""
        return self.stages[self.stage_index(consumed)].checkpoint

    def upcoming(self, consumed: int) -> list[int]:
        """Teacher steps of the stages after that, in order: the first is to be fetched ahead."""
        following = self.stages[self.stage_index(consumed) + 1 :]
        return [*(stage.checkpoint for stage in following), *self.waiting]

    def advanced(self, consumed: int) -> Schedule:
        """The schedule in which the first of the waiting checkpoints teaches from `consumed` samples on."""
        stage = Stage(consumed, self.waiting[0])
        return replace(self, stages=(*self.stages, stage), waiting=self.waiting[1:])

    @property
    def ends_on_final(self) -> bool:
        return self.stages[-1].checkpoint == self.final_checkpoint

    def table(self) -> str:
        """The stages for a reader: student steps, teacher step, share of the budget."""
        ends = [s.first_sample for s in self.stages[1:]] + [self.total_samples]
        lines = ["stage  student steps        teacher step  share"]
        for i, (stage, end) in enumerate(zip(self.stages, ends, strict=False)):
            first, last = stage.first_sample // self.batch_size, end // self.batch_size - 1
            share = (end - stage.first_sample) / self.total_samples
            lines.append(f"{i:>5}  {first:>8} - {last:<8}  {stage.checkpoint:>12}  {share:>5.1%}")
        if self.waiting:
            turn = ", ".join(map(str, self.waiting))
            lines.append(f"in their turn, each when the student stops gaining: {turn}")
        lines.append(
            f"ends on the final teacher: {'yes' if self.ends_on_final else 'NO'} (final: step {self.final_checkpoint})"
        )
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(
            {
                "total_samples": self.total_samples,
                "batch_size": self.batch_size,
                "final_checkpoint": self.final_checkpoint,
                "unsettled": self.unsettled,
                "stages": [[s.first_sample, s.checkpoint] for s in self.stages],
                **({"waiting": self.waiting} if self.waiting else {}),
            },
            indent=1,
        )


def schedule_from_json(text: str) -> Schedule:
    """What `to_json` wrote."""
    content = json.loads(text)
    stages = tuple(Stage(*stage) for stage in content["stages"])
    return Schedule(**{**content, "stages": stages, "waiting": tuple(content.get("waiting", ()))})


# ------------------------------------------------------------------------------------------------ teacher


def make_schedule(
    config: ScheduleConfig, available: Sequence[int], losses: Mapping[int, float], steps: int, batch_size: int
) -> Schedule:
    """The schedule that `config` asks for. Step 0 of a teacher never teaches.

    Args:
        available: teacher steps that the trajectory has.
        losses: validation loss of the checkpoints, where the manifest has it; two_shot picks its early
            checkpoint by it.
        steps: student steps in all.
        batch_size: sequences a step.

    Raises:
        ValueError: a checkpoint that the trajectory lacks (with the nearest), or stages that don't fit the
            budget.
    """
    known = sorted(c for c in available if c > 0)
    if not known:
        raise ValueError(f"the trajectory has no checkpoint after step 0 (it has {list(available)})")
    chosen = sorted(config.checkpoints) if config.checkpoints else known
    plan = {  # kind -> [(first student step, teacher step)]
        "one_shot": lambda: [(0, chosen[-1])],
        "equal": lambda: _equal(_spaced(chosen, config.num_stages), steps),
        "n_t": lambda: _n_t(_spaced(chosen, config.num_stages), config.stage_steps),
        "two_shot": lambda: _two_shot(config, known, losses, steps),
        "explicit": lambda: [(first, checkpoint) for first, checkpoint in config.stages],
        "speed": lambda: _speed(chosen, config.speed, steps),
        "saturation": lambda: [(0, _spaced(chosen, config.num_stages)[0])],
    }[config.kind]()
    waiting = _spaced(chosen, config.num_stages)[1:] if config.kind == "saturation" else []
    _check_known([*(c for _, c in plan), *waiting], known)
    _check_starts([first for first, _ in plan], steps)
    stages = tuple(Stage(first * batch_size, c) for first, c in plan)
    return Schedule(stages, steps * batch_size, batch_size, known[-1], waiting=tuple(waiting))


def _spaced(checkpoints: list[int], number: int) -> list[int]:
    """`number` of the checkpoints, the last always, each the next at or after its equally spaced mark."""
    if number > len(checkpoints):
        raise ValueError(
            f"schedule.num_stages={number} but only {len(checkpoints)} checkpoints may teach: {checkpoints}"
        )
    if number in (0, len(checkpoints)):
        return checkpoints
    marks = [checkpoints[-1] * (i + 1) / number for i in range(number)]
    spaced = sorted({next(c for c in checkpoints if c >= mark) for mark in marks})
    if len(spaced) < number:
        raise ValueError(
            f"schedule.num_stages={number}: the equally spaced marks {[round(m, 1) for m in marks]} fall on only "
            f"{len(spaced)} of the checkpoints {checkpoints}, {spaced}: name {number} of them in schedule.checkpoints"
        )
    return spaced


def _equal(checkpoints: list[int], steps: int) -> list[tuple[int, int]]:
    if len(checkpoints) > steps:
        raise ValueError(
            f"schedule.kind=equal has {len(checkpoints)} stages for {steps} steps: set schedule.num_stages or "
            "schedule.checkpoints"
        )
    return [(i * steps // len(checkpoints), c) for i, c in enumerate(checkpoints)]


def _n_t(checkpoints: list[int], stage_steps: int) -> list[tuple[int, int]]:
    return [(i * stage_steps, c) for i, c in enumerate(checkpoints)]


def _two_shot(
    config: ScheduleConfig, known: list[int], losses: Mapping[int, float], steps: int
) -> list[tuple[int, int]]:
    early = config.checkpoints[0] if config.checkpoints else steepest_checkpoint(losses)
    final = config.checkpoints[1] if len(config.checkpoints) > 1 else known[-1]
    switch = round(config.early_share * steps)
    return [(0, early), (switch, final)] if switch > 0 else [(0, final)]


def _speed(checkpoints: list[int], speed: float, steps: int) -> list[tuple[int, int]]:
    """Student step s has the first checkpoint at or ahead of teacher step speed*(s+1), or the last of all.

    A short run never sees the last.
    """
    exact = Fraction(str(speed))  # in floats 33 / 1.1 is 29.999..., a step too early
    starts = [0] + [math.floor(c / exact) for c in checkpoints[:-1]]
    # Of checkpoints closer than one student step the later one teaches.
    latest = dict(zip(starts, checkpoints, strict=True))
    return sorted((first, c) for first, c in latest.items() if first < steps)


def together(step: int, known: Iterable[int], size: int) -> list[int]:
    """The teacher steps that teach with `step`, itself included, by slot; of all that are `known`.

    They are the last `size` up to it, the untrained step 0 left out; where there are fewer, the first one stands in
    for those that lack. A step has the same slot whoever it teaches with, so that it need not be read again.
    """
    trained = sorted(k for k in known if k > 0)
    last = trained.index(step)
    slots = [step] * size
    for number in range(last - size + 1, last + 1):
        slots[number % size] = trained[max(number, 0)]
    return slots


def steepest_checkpoint(losses: Mapping[int, float]) -> int:
    """The checkpoint inside the phase transition, by the validation losses of all.

    It has the largest drop of the loss per doubling of steps since its predecessor.

    Raises:
        ValueError: fewer than two checkpoints have a validation loss.
    """
    steps = sorted(s for s in losses if s > 0)
    if len(steps) < 2:
        raise ValueError(
            "two_shot needs schedule.checkpoints=[EARLY], as the trajectory's manifest has no validation losses to pick it by"
        )
    slopes = {b: (losses[a] - losses[b]) / math.log(b / a) for a, b in zip(steps, steps[1:], strict=False)}
    return max(slopes, key=lambda step: slopes[step])


def follow_student(
    schedule: Schedule, config: ScheduleConfig, consumed: int, gained: Sequence[float], accuracy: float
) -> tuple[Schedule, list[float]]:
    """What a validation after `consumed` samples decides: the schedule, and the accuracies of the stage so far.

    The next checkpoint teaches once the student has stopped gaining, or `stage_steps` are over. The original's
    rule (`progressive_till_saturate` of Panigrahi et al.'s code) also waited for a first gain, and so never left
    a teacher that has nothing to teach. A decision that the schedule holds already is not taken again: a run
    that goes on from before it repeats it.

    gained: the accuracies (0 to 1) that the last call returned; empty at first.
    """
    stage = schedule.stages[schedule.stage_index(consumed)]
    if stage.first_sample == consumed:  # decided before the run was cut off
        return schedule, [accuracy]
    gained = [*gained, accuracy]
    if stage != schedule.stages[-1] or not schedule.waiting or consumed >= schedule.total_samples:
        return schedule, gained
    stayed = (consumed - stage.first_sample) // schedule.batch_size
    if is_saturated(gained, config.patience, config.min_gain) or 0 < config.stage_steps <= stayed:
        return schedule.advanced(consumed), [accuracy]
    return schedule, gained


def is_saturated(accuracies: Sequence[float], patience: int, min_gain: float) -> bool:
    """Whether the last `patience` accuracies are nowhere `min_gain` above the best before them."""
    before, recent = accuracies[:-patience], accuracies[-patience:]
    return bool(before) and max(recent) < max(before) + min_gain


def _check_known(checkpoints: list[int], known: list[int]) -> None:
    for checkpoint in checkpoints:
        if checkpoint not in known:
            nearest = sorted(known, key=lambda c: abs(c - checkpoint))[:2]
            raise ValueError(
                f"the schedule names teacher step {checkpoint}, which the trajectory lacks; the nearest are {sorted(nearest)}"
            )


def _check_starts(firsts: list[int], steps: int) -> None:
    if firsts[0] != 0 or any(b <= a for a, b in zip(firsts, firsts[1:], strict=False)):
        raise ValueError(
            f"stages must start at step 0 and rise strictly, got first steps {firsts} in a budget of {steps} steps"
        )
    if firsts[-1] >= steps and len(firsts) > 1:
        raise ValueError(
            f"the last stage starts at step {firsts[-1]}, after the budget of {steps} steps: "
            "lengthen the run or shorten the stages"
        )


# ------------------------------------------------------------------------------------------------ scalars


def ramp_at(ramp: Ramp, share: float) -> float:
    """Value of a ramp at `share` (0 to 1) of the budget: linear between its points, flat outside."""
    if not isinstance(ramp, list):
        return ramp
    shares = [p[0] for p in ramp]
    i = bisect.bisect_right(shares, share)
    if i in (0, len(ramp)):
        return ramp[max(i - 1, 0)][1]
    (a, low), (b, high) = ramp[i - 1], ramp[i]
    return low + (high - low) * (share - a) / (b - a)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then cosine, WSD or constant."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    floor = config.lr * config.final_lr_share
    if config.decay == "constant":
        return config.lr
    if config.decay == "wsd":
        decay_steps = max(1, round(config.decay_share * steps))
        return floor + (config.lr - floor) * min(1.0, (steps - step) / decay_steps)
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def is_trajectory_step(step: int, every: int, first: int) -> bool:
    """Whether a teacher run leaves a checkpoint after `step` steps.

    It does so at first, 2*first, 4*first, ... below `every`, then each `every`. The log-spaced start is
    Pythia's: the phase transition of a teacher is short and early.
    """
    if every == 0 or step == 0:
        return False
    log_spaced = first > 0 and step < every and step % first == 0 and (step // first).bit_count() == 1
    return step % every == 0 or log_spaced


LOSS_DROP = 0.3  # nats per doubling of steps: several times what a loss falls by on its plateaus


def in_loss_drop(left: Sequence[Sequence[float]], drop: float = LOSS_DROP) -> bool:
    """Whether the loss fell by more than `drop` nats per doubling of steps between the last two checkpoints.

    left: their [step, validation loss].
    """
    if len(left) < 2:
        return False
    (before, high), (after, low) = left[-2:]
    return high - low > drop * math.log2(after / before)


@dataclass(frozen=True)
class Due:
    """What a run does after a step."""

    log: bool
    validate: bool
    leave_checkpoint: bool  # in the trajectory of a teacher run
    save: bool


def due_after(step: int, config: Config, left: Sequence[Sequence[float]] = ()) -> Due:
    """What is due after `step` steps. A checkpoint of a trajectory is always validated, and so is the last step.

    left: [step, validation loss] of the checkpoints left last, by which the loss drop is known.
    """
    last, save = step == config.steps, config.save
    leave_checkpoint = is_trajectory_step(step, save.trajectory_every, save.trajectory_first)
    if save.trajectory_drop_every and in_loss_drop(left):
        leave_checkpoint = leave_checkpoint or step % save.trajectory_drop_every == 0
    leave_checkpoint = leave_checkpoint or (last and save.trajectory_every > 0)
    return Due(
        log=step % config.log.every == 0,
        validate=step % config.log.eval_every == 0 or leave_checkpoint or last,
        leave_checkpoint=leave_checkpoint,
        save=step % save.every == 0 or last,
    )
