"""Which low-degree monomials a network leaks: the implicit curriculum of sparse parity."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.experiments.parity.checkpoints import Trajectory, describe_net
from distill.experiments.parity.models import MODELS, logits_of
from distill.experiments.parity.settings import Settings
from distill.experiments.parity.task import PROBE, Task, samples

NUM_OFF_SUPPORT = 100


class FourierProbe:
    """|E[q(x) prod_{i in A} x_i]| over sets A of degree 1 to k - 1 inside the support and outside.

    q is the probability (temperature 1) that the leaf lies right of the root: class 1 of plain parity. Outside:
    100 random sets that are not inside; they may overlap the support (Panigrahi et al., appendix, and their
    code). Sampling alone makes correlations of about sqrt(Var q / samples).
    """

    def __init__(self, task: Task, num_samples: int, seed: int) -> None:
        self.degrees = list(range(1, task.k))
        self.x_ND = samples(task, seed, PROBE, 0, num_samples)
        self.right_C = task.right_of()[:, 0]
        rng, support = np.random.default_rng((PROBE, seed, 1)), task.supports[0]
        self._inside = {m: self._monomials(list(combinations(support, m))) for m in self.degrees}
        self._outside = {m: self._monomials(_random_sets(task, m, rng)) for m in self.degrees}

    def _monomials(self, sets: list[tuple[int, ...]]) -> Tensor:
        """[sets, N]: the value of each on every sample."""
        values = [self.x_ND[:, list(members)].prod(1) for members in sets]
        return torch.stack(values) if values else self.x_ND.new_zeros(0, len(self.x_ND))

    def correlations(self, logits_NC: Tensor) -> dict[str, dict[int, float]]:
        """Mean over sets of each degree, inside the support and off it."""
        q_N = logits_NC.cpu().softmax(-1) @ self.right_C
        return {
            "inside": {m: self._mean(monomials, q_N) for m, monomials in self._inside.items()},
            "outside": {m: self._mean(monomials, q_N) for m, monomials in self._outside.items()},
        }

    def _mean(self, monomials: Tensor, q_N: Tensor) -> float:
        return (monomials @ q_N / len(q_N)).abs().mean().item() if len(monomials) else float("nan")


def _random_sets(task: Task, degree: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Random sets of coordinates that are not subsets of the root's support."""
    support, found = set(task.supports[0]), set[tuple[int, ...]]()
    if task.d == len(support):
        return []
    for _ in range(50 * NUM_OFF_SUPPORT):
        members = tuple(sorted(rng.choice(task.d, degree, replace=False).tolist()))
        if not set(members) <= support:
            found.add(members)
        if len(found) == NUM_OFF_SUPPORT:
            break
    return sorted(found)


def probe_trajectories(
    settings: Settings, trajectories: list[Trajectory], device: torch.device
) -> list[dict[int, dict[str, Any]]]:
    """Correlations of every checkpoint, by seed and teacher step."""
    model, described = MODELS[settings.model], describe_net(settings, settings.teacher)
    size = model.features_a_row(settings.task, settings.teacher.width)
    found = []
    for seed, trajectory in zip(settings.seeds, trajectories, strict=True):
        probe = FourierProbe(settings.task, settings.probe_samples, seed)
        x_SND, by_step = probe.x_ND[None].to(device), {}
        for step in trajectory.steps:
            net = trajectory.read(step, described)
            params = {name: tensor[None].to(device) for name, tensor in net.items()}
            by_step[step] = probe.correlations(logits_of(model, params, x_SND, size)[0])
        found.append(by_step)
    return found
