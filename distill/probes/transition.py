"""Where in its trajectory a teacher makes its phase transition, and the schedule that follows from it.

Panigrahi et al. (ICLR 2025): one checkpoint from inside the transition, then the final teacher, is enough; from
before or after it, it is of no use. The steepest fall of the loss is not trusted alone: noise of the first steps,
and the fall to the plateau of word frequencies, are steep as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

SIGMAS = 5  # that the accuracy must lie above chance
_SETTLED = 0.95  # share of the loss's fall after which a teacher is as good as final
_FADED = 0.8  # M_robust has fallen if it ends below this share of its peak


class NoTransition(ValueError):
    """The trajectory shows no phase transition that a schedule could use."""


@dataclass(frozen=True)
class Suggestion:
    """Teacher steps for a two_shot schedule, and why."""

    early: int
    final: int
    early_share: float
    reasons: tuple[str, ...]

    def to_yaml(self) -> str:
        """A config file for `distill train`, its reasons as comments."""
        schedule = {
            "kind": "two_shot",
            "checkpoints": [self.early, self.final],
            "early_share": self.early_share,
        }
        return "".join(f"# {r}\n" for r in self.reasons) + yaml.safe_dump(
            {"schedule": schedule}, sort_keys=False
        )


def suggest_schedule(
    rows: Sequence[Mapping[str, Any]],
    chance: Mapping[str, float],
    early_share: float = 0.1,
    final: int | None = None,
) -> Suggestion:
    """The checkpoint inside the transition, by the rows of `distill probe` (one a checkpoint, in order of steps).

    Args:
        chance: accuracy and loss of a model that knows the frequencies of words alone.
        final: the trajectory's last step, if `rows` may end before it.

    Raises:
        NoTransition: too few checkpoints, none above chance, or the fall lies before the first one.
    """
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    final = final or steps[-1]
    if len(rows) < 4:
        raise NoTransition(
            f"{len(rows)} checkpoints, steps {steps}: at least 4 are needed to see a transition"
        )
    lucky = chance["accuracy"]
    bar = lucky + SIGMAS * math.sqrt(lucky * (1 - lucky) / rows[-1]["num_rows"])
    able = [row["accuracy"] > bar and row["loss"] < chance["loss"] for row in rows]
    if not able[-1]:
        raise NoTransition(
            f"the last checkpoint asked, step {steps[-1]}, top-1 {rows[-1]['accuracy']:.3f} and loss {losses[-1]:.3f}, "
            f"is no better than knowing the frequencies of words, {bar:.3f} and {chance['loss']:.3f}: "
            "this teacher has not learned yet"
        )
    fallen = [(losses[0] - loss) / max(losses[0] - min(losses), 1e-12) for loss in losses]
    candidates = [i for i in range(len(rows) - 1) if able[i] and fallen[i] < _SETTLED]
    if not candidates:
        raise NoTransition(
            f"no checkpoint lies between chance (top-1 {bar:.3f}) and {_SETTLED:.0%} of the loss's fall; steps {steps}: "
            "the teacher must leave more checkpoints while its loss falls (save.trajectory_first)"
        )
    # The fall to the plateau of word frequencies is not the transition: what lies above the plateau counts as on it.
    below = np.minimum(losses, chance["loss"])
    slopes = -np.gradient(below, np.log(steps))
    best = max(candidates, key=lambda i: slopes[i])
    if best == 0:
        raise NoTransition(
            f"the loss falls fastest at step {steps[0]}, the first checkpoint: the transition may lie before it; "
            "the teacher must leave earlier checkpoints (save.trajectory_first)"
        )
    reasons = (
        f"step {steps[best]}: the loss falls fastest there, {slopes[best]:.3f} nats for a factor e of steps, from "
        f"{below[best - 1]:.3f} at step {steps[best - 1]} to {below[best + 1]:.3f} at step {steps[best + 1]}; "
        f"one above that of word frequencies, {chance['loss']:.3f}, counts as equal to it",
        f"its top-1 {rows[best]['accuracy']:.3f} and loss are better than knowing the frequencies of words ({lucky:.3f} + "
        f"{SIGMAS} sigma, {chance['loss']:.3f}), so that it is no noise of the first steps; passed over as such: "
        f"{[s for s, a in zip(steps, able, strict=True) if not a]}",
        *_probe_reasons(rows, steps[best]),
        f"then the final teacher, step {final}, for {1 - early_share:.0%} of the budget"
        + (f"; the steps asked end at {steps[-1]}" if final != steps[-1] else ""),
    )
    return Suggestion(steps[best], final, early_share, reasons)


def _probe_reasons(rows: Sequence[Mapping[str, Any]], picked: int) -> list[str]:
    """What M_robust(3), where it was measured, says about the step picked."""
    medians = {row["step"]: row["robust_3"][1] for row in rows if "robust_3" in row}
    if not medians:
        return []
    peak, last = max(medians, key=lambda step: medians[step]), max(medians)
    course = f"M_robust(3) peaks at step {peak} ({medians[peak]:.3f}) and ends at {medians[last]:.3f}"
    if medians[last] > _FADED * medians[peak]:
        return [f"{course}: it does not fall again, which neither confirms nor refutes the choice"]
    verdict = "confirms" if medians[picked] >= 0.5 * medians[peak] else "does NOT confirm"
    return [
        f"{course}; at step {picked} it is {medians[picked]:.3f}, which {verdict} the choice (half of the peak)"
    ]
