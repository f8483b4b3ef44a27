"""Accuracy of every arm and the teachers' correlations over their steps, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.experiments.arms import mean_and_spread, pyplot
from distill.experiments.parity.arms import Picks
from distill.experiments.parity.findings import Correlations
from distill.experiments.parity.runs import Arm, Curve
from distill.experiments.parity.settings import Settings
from distill.probes.report import save_figure


def draw(
    path: Path,
    settings: Settings,
    arms: list[Arm],
    curves: dict[str, Curve],
    teachers: Curve,
    picks: list[Picks],
    correlations: Correlations,
) -> None:
    """A panel a temperature, each seed a line; one of correlations, their means over seeds."""
    temperatures = settings.temperatures
    figure, axes = pyplot.subplots(
        1, len(temperatures) + 1, figsize=(6 * len(temperatures) + 6, 4.5), constrained_layout=True
    )
    for axis, temperature in zip(axes, temperatures, strict=False):
        lines = [("teacher", "teacher", teachers), ("hard", "hard labels", curves["hard"])]
        lines += [(arm.name, arm.title, curves[arm.name]) for arm in arms if arm.temperature == temperature]
        for i, (_, title, curve) in enumerate(lines):
            for j, accuracy in enumerate(zip(*curve.accuracy, strict=True)):
                style: dict[str, Any] = {
                    "color": "black" if i == 0 else f"C{i}",
                    "linewidth": 1,
                    "alpha": 0.8,
                }
                axis.plot(curve.steps, accuracy, label=title if j == 0 else None, **style)
        axis.set(
            xlabel="steps", ylabel="accuracy", title=f"temperature {temperature:g}, seeds {settings.seeds}"
        )
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _draw_correlations(axes[-1], settings, picks, correlations)
    save_figure(figure, path)


def _draw_correlations(axis: Any, settings: Settings, picks: list[Picks], correlations: Correlations) -> None:
    steps = sorted(correlations[0])
    for m in range(1, settings.k):
        for where, line in (("inside", "-"), ("outside", ":")):
            means = [mean_and_spread([by_step[s][where][m] for by_step in correlations])[0] for s in steps]
            axis.plot(
                steps,
                means,
                f"C{m - 1}{line}",
                label=f"degree {m}, {'in' if where == 'inside' else 'off'} support",
            )
    for pick in picks:
        axis.axvline(pick.inside, color="grey", linewidth=0.7)
    axis.set(
        xlabel="teacher's steps", ylabel="mean |correlation|", title="grey: checkpoints inside the transition"
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
