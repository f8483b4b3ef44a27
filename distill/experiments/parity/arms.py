"""The arms of the comparison, and the checkpoints of each teacher that its 2-shot students learn from."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import ScheduleConfig
from distill.experiments.parity.runs import Arm, Curve
from distill.experiments.parity.settings import Settings

SOLVED, PERFECT = 0.95, 0.995


@dataclass(frozen=True)
class Picks:
    """Teacher steps before, inside and after the phase transition of one teacher."""

    before: int
    inside: int
    after: int


def pick_checkpoints(settings: Settings, teachers: Curve) -> list[Picks]:
    """For every seed: the checkpoint nearest to half-way between chance and 1, one before, the first perfect one.

    Raises:
        ValueError: a teacher that never gets there, or gets there at once.
    """
    picks, half_way = [], (1 + 1 / settings.task.num_classes) / 2
    for i, seed in enumerate(settings.seeds):
        accuracy = [row[i] for row in teachers.accuracy]
        perfect = next((s for s, a in zip(teachers.steps, accuracy, strict=True) if a >= PERFECT), None)
        if perfect is None:
            raise ValueError(
                f"the teacher of seed {seed} ends at accuracy {accuracy[-1]:.3f}, not at {PERFECT}: "
                f"raise teacher.steps={settings.teacher.steps} or teacher.optim.lr, or lower d or k"
            )
        inside = min(zip(teachers.steps, accuracy, strict=True), key=lambda pair: abs(pair[1] - half_way))[0]
        before = inside - settings.early_distance
        if before < settings.every or inside >= perfect:
            raise ValueError(
                f"the teacher of seed {seed} is half-way at step {inside} and perfect at {perfect}: there is no checkpoint "
                f"{settings.early_distance} steps before or none inside; lower every={settings.every} or early_distance"
            )
        picks.append(Picks(before, inside, perfect))
    return picks


def make_arms(settings: Settings, picks: list[Picks]) -> list[Arm]:
    """Labels alone, and every schedule at every temperature."""
    num_seeds = len(picks)
    plans = {
        "one_shot": ("one-shot (final teacher)", [ScheduleConfig("one_shot")] * num_seeds),
        "progressive": ("progressive, every checkpoint", [ScheduleConfig("speed")] * num_seeds),
        "before": ("2-shot, before the transition", [_two_shot(settings, p.before) for p in picks]),
        "inside": ("2-shot, inside the transition", [_two_shot(settings, p.inside) for p in picks]),
        "after": ("2-shot, after the transition", [_two_shot(settings, p.after) for p in picks]),
        "saturation": ("adaptive: on when it stops gaining", [ScheduleConfig("saturation", patience=1)] * num_seeds),
    }  # fmt: skip
    return [Arm("hard", "hard labels")] + [
        Arm(arm_name(name, temperature), title, schedules, temperature)
        for temperature in settings.temperatures
        for name, (title, schedules) in plans.items()
    ]


def arm_name(name: str, temperature: float) -> str:
    return f"{name}_t{temperature:g}"


def _two_shot(settings: Settings, early: int) -> ScheduleConfig:
    share = settings.early_steps / settings.student.steps
    return ScheduleConfig("two_shot", checkpoints=[early], early_share=share)
