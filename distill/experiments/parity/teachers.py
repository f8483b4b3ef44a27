"""Who teaches which student: checkpoints of several trajectories, as the schedules of all students say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distill.config import ScheduleConfig
from distill.experiments.parity.checkpoints import Trajectory, describe_net
from distill.experiments.parity.models import MODELS, Params, logits_of
from distill.experiments.parity.settings import Settings
from distill.schedule import Schedule, follow_student, make_schedule

Key = tuple[int, int]  # (index of the seed, teacher step)


class Teachers:
    """The teacher of every student; swapped between two blocks of samples, never inside one.

    plans: for every arm a schedule a seed, or None for an arm without teachers.

    Raises:
        ValueError: a schedule that the trajectory or the budget doesn't allow, or whose stages start inside a block.
    """

    def __init__(
        self,
        settings: Settings,
        plans: list[list[ScheduleConfig] | None],
        trajectories: list[Trajectory],
        device: torch.device,
    ) -> None:
        self.settings, self.trajectories, self.device = settings, trajectories, device
        self.model, self.described = MODELS[settings.model], describe_net(settings, settings.teacher)
        self.plans = plans
        self.schedules = [
            [self._schedule(*pair) for pair in enumerate(plan)] if plan else None for plan in plans
        ]
        self.gained: list[list[list[float]]] = [[[] for _ in settings.seeds] for _ in plans]
        self._teaching: list[list[int] | None] = []
        self._loaded: dict[Key, Params] = {}

    def _schedule(self, seed: int, config: ScheduleConfig) -> Schedule:
        s, trajectory = self.settings, self.trajectories[seed]
        schedule = make_schedule(config, trajectory.steps, trajectory.losses, s.student.steps, s.batch_size)
        starts = [stage.first_sample // s.batch_size for stage in schedule.stages]
        if inside := [start for start in starts if start % s.every]:
            raise ValueError(
                f"a teacher's stage starts at step {inside[0]}: it must be a multiple of every={s.every}"
            )
        return schedule

    def follow(self, consumed: int) -> list[list[int] | None]:
        """Let the checkpoints teach that rule after `consumed` samples. Their teacher steps, [arm][seed]."""
        self._teaching = [
            [schedule.checkpoint_at(consumed) for schedule in plan] if plan else None
            for plan in self.schedules
        ]
        wanted = {key for steps in self._teaching if steps for key in enumerate(steps)}
        self._loaded = {key: self._loaded.get(key) or self._read(*key) for key in sorted(wanted)}
        return self._teaching

    def _read(self, seed: int, step: int) -> Params:
        net = self.trajectories[seed].read(step, self.described)
        return {name: tensor[None].to(self.device) for name, tensor in net.items()}

    def logits(self, x_TSBD: Tensor) -> Tensor:
        """[steps, arms * S, batch, classes]; zeros where nobody teaches. A checkpoint is asked once a block."""
        steps, seeds, batch, _ = x_TSBD.shape
        size = self.model.features_a_row(self.settings.task, self.settings.teacher.width)
        said = {
            (seed, step): logits_of(self.model, net, x_TSBD[:, seed].reshape(1, steps * batch, -1), size)
            for (seed, step), net in self._loaded.items()
        }
        shape = (steps, len(self.plans) * seeds, batch, self.settings.task.num_classes)
        logits = torch.zeros(shape, device=self.device)
        for arm, teaching in enumerate(self._teaching):
            for seed, step in enumerate(teaching or ()):
                logits[:, arm * seeds + seed] = said[seed, step].reshape(steps, batch, -1)
        return logits

    def note(self, consumed: int, accuracy: list[list[float]]) -> None:
        """Let the schedules that wait for their student hear of a validation, [arm][seed]."""
        for plan, schedules, gained, accuracies in zip(
            self.plans, self.schedules, self.gained, accuracy, strict=True
        ):
            for i, config in enumerate(plan or ()):
                if schedules and config.kind == "saturation":
                    schedules[i], gained[i] = follow_student(
                        schedules[i], config, consumed, gained[i], accuracies[i]
                    )

    def replay(self, rows: list[dict[str, Any]]) -> None:
        """The decisions of a run that goes on, from the validations on its record."""
        for row in rows:
            self.note(row["step"] * self.settings.batch_size, row["accuracy"])
