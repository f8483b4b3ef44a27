"""The two runs of a study: the teachers of all seeds, then the students of all arms. Each goes on where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_prep.progress import progress
from distill.config import ScheduleConfig
from distill.experiments.parity.checkpoints import Trajectory, describe_net, open_trajectory
from distill.experiments.parity.population import LABELS_ALONE, Lesson, Population
from distill.experiments.parity.settings import Settings
from distill.experiments.parity.task import STUDENT, TEACHER
from distill.experiments.parity.teachers import Teachers

SECONDS_BETWEEN_SAVES = 5.0
# Settings that the runs depend on through the arms alone, or not at all.
FREE = ("temperatures", "early_steps", "early_distance", "probe_samples")


@dataclass(frozen=True)
class Arm:
    """A way to teach the students: a schedule for every seed, or None for labels alone."""

    name: str
    title: str
    schedules: list[ScheduleConfig] | None = None
    temperature: float | None = None


@dataclass
class Curve:
    """The validations of one network a seed. accuracy, loss: [validation][seed].

    seconds: that the run took over all its starts, all arms that ran beside it included.
    """

    steps: list[int]
    accuracy: list[list[float]]
    loss: list[list[float]]
    seconds: float = field(default=0.0, compare=False)

    def steps_to(self, accuracy: float) -> list[int | None]:
        """First validated step with at least this accuracy, for every seed; None where there is none."""
        reached = [[a >= accuracy for a in seed] for seed in zip(*self.accuracy, strict=True)]
        return [self.steps[seed.index(True)] if any(seed) else None for seed in reached]


def train_teachers(out: Path, settings: Settings, device: torch.device) -> tuple[Curve, list[Trajectory]]:
    """A teacher a seed on hard labels, and the trajectory that each leaves in `out`/teachers."""
    folder = out / "teachers"
    trajectories = [
        open_trajectory(folder / f"seed{seed}" / "trajectory", settings.task.num_classes)
        for seed in settings.seeds
    ]
    population = Population(settings, settings.teacher, TEACHER, device)
    described = describe_net(settings, settings.teacher)

    def train_block() -> dict[str, Any]:
        population.train(population.next_block(), LABELS_ALONE)
        row = population.validate()
        samples = population.step * settings.batch_size
        for i, trajectory in enumerate(trajectories):
            trajectory.add(population.step, population.network(i), described, samples, row["loss"][0][i])
        return row

    bound_to = {key: value for key, value in asdict(settings).items() if key not in (*FREE, "student")}
    _run(folder, "teachers", population, bound_to, train_block)
    for trajectory in trajectories:
        trajectory.complete()
    return curve_of(population.rows, 0), trajectories


def train_students(
    out: Path, settings: Settings, arms: list[Arm], trajectories: list[Trajectory], device: torch.device
) -> dict[str, Curve]:
    """All arms at once, side by side: a student a seed and arm, which differ in their teacher alone."""
    arms = sorted(arms, key=lambda arm: -1.0 if arm.temperature is None else arm.temperature)  # stable
    population = Population(settings, settings.student, STUDENT, device, copies=len(arms))
    teachers = Teachers(settings, [arm.schedules for arm in arms], trajectories, device)
    lessons = _lessons(arms, len(settings.seeds))

    def train_block() -> dict[str, Any]:
        x_TSBD = population.next_block()
        steps = teachers.follow(population.step * settings.batch_size)
        population.train(x_TSBD, lessons, teachers.logits(x_TSBD))
        row = population.validate()
        teachers.note(population.step * settings.batch_size, row["accuracy"])
        return {**row, "teacher_step": steps}

    told = {"arms": [asdict(arm) for arm in arms]}
    bound_to = {key: value for key, value in asdict(settings).items() if key not in FREE} | told
    _run(
        out / "students",
        "students",
        population,
        bound_to,
        train_block,
        lambda: teachers.replay(population.rows),
    )
    return {arm.name: curve_of(population.rows, i) for i, arm in enumerate(arms)}


def _lessons(arms: list[Arm], seeds: int) -> list[Lesson]:
    """Arms of one temperature, which stand side by side, share one call of the divergence."""
    temperatures = [arm.temperature for arm in arms]
    starts = [i for i, t in enumerate(temperatures) if i == 0 or t != temperatures[i - 1]]
    ends = [*starts[1:], len(arms)]
    return [
        Lesson(slice(start * seeds, end * seeds), temperatures[start])
        for start, end in zip(starts, ends, strict=True)
    ]


def _run(
    folder: Path,
    name: str,
    population: Population,
    bound_to: dict[str, Any],
    train_block: Callable[[], dict[str, Any]],
    after_resume: Callable[[], None] = lambda: None,
) -> None:
    """Blocks up to the budget, from where `folder` stands; each row notes the seconds of training so far."""
    population.load(folder, bound_to)
    after_resume()
    before = population.rows[-1]["seconds"] if population.rows else 0.0
    start = saved = time.monotonic()
    with progress(name, population.net.steps, "step", population.step) as advance:
        while (step := population.step) < population.net.steps:
            row = train_block()
            now = time.monotonic()
            population.rows.append({**row, "seconds": before + now - start})
            advance(population.step - step)
            if now - saved > SECONDS_BETWEEN_SAVES or population.step == population.net.steps:
                population.save(folder, bound_to)
                saved = now


def curve_of(rows: list[dict[str, Any]], copy: int) -> Curve:
    """What a run's rows tell of one of its copies."""
    return Curve(
        [row["step"] for row in rows],
        [row["accuracy"][copy] for row in rows],
        [row["loss"][copy] for row in rows],
        rows[-1]["seconds"],
    )
