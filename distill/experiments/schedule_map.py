"""When do successive teachers beat the final one? Schedule x temperature x budget x student width on real text.

    python -m distill.experiments.schedule_map                                   # temperature 1, 1000 steps, width 16
    python -m distill.experiments.schedule_map --budgets 300 3000 --temperatures 0 1 --arms one_shot inside_10

The text is the demo's (`distill.experiments.wiki_books`), and is prepared if it is missing. A cell (budget, temperature,
width) has every arm over the same seeds; an arm is compared with one-shot seed by seed. What is finished is not trained
again; table, map.json and map.png are those of the last command. Other settings (key=value) need another --out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from distill.experiments.arms import (
    Arm,
    curve,
    mean_and_spread,
    paired_t,
    save_results,
    told,
    train_arm,
)
from distill.experiments.wiki_books import CONFIGS, prepare_data
from distill.probes.report import save_figure
from distill.run_folder import read_result
from distill.schedule import steepest_checkpoint
from distill.trajectory.manifest import load_manifest

BASE = "one_shot"
SHARES = (5, 10, 20, 50)  # percent of the budget on the early checkpoint


@dataclass(frozen=True)
class Cell:
    """What all arms of a comparison have in common."""

    budget: int  # steps
    temperature: float
    width: int  # of the student

    @property
    def name(self) -> str:
        return f"b{self.budget}_t{self.temperature:g}_w{self.width}"

    @property
    def title(self) -> str:
        return f"{self.budget} steps, temperature {self.temperature:g}, width {self.width}"

    def settings(self) -> list[str]:
        validations = max(1, self.budget // 10)
        return [
            f"steps={self.budget}",
            f"objective.temperature={self.temperature}",
            f"model.overrides.hidden_size={self.width}",
            f"model.overrides.intermediate_size={2 * self.width}",
            f"log.eval_every={validations}",
            f"save.every={validations}",
        ]


def arms(trajectory: Path, losses: Mapping[int, float], budget: int) -> dict[str, Arm]:
    """Every schedule of the map. `losses`: the validation loss of each teacher checkpoint."""
    taught, steps = f"teacher.trajectory={trajectory}", sorted(losses)
    inside = steepest_checkpoint(losses)
    known = [
        Arm(BASE, "one-shot (final teacher)", (taught, "schedule.kind=one_shot")),
        Arm("equal", "10 equal stages", (taught, "schedule.kind=equal", "schedule.num_stages=10")),
        Arm("short", "9 stages of 2 %, then the final teacher", (taught, "schedule.kind=n_t", "schedule.num_stages=10",
            f"schedule.stage_steps={max(1, budget // 50)}")),
    ]  # fmt: skip
    early = {
        "before": max((s for s in steps if s <= inside // 4), default=steps[0]),
        "inside": inside,
        "after": min((s for s in steps if s >= 3 * inside), default=steps[-1]),
    }
    for (place, step), share in itertools.product(early.items(), SHARES):
        settings = ("schedule.kind=two_shot", f"schedule.checkpoints=[{step},{steps[-1]}]")
        title = f"2-shot {place} (step {step}), {share} %"
        known.append(
            Arm(f"{place}_{share}", title, (taught, *settings, f"schedule.early_share={share / 100}"))
        )
    return {arm.name: arm for arm in known}


def study(arguments: argparse.Namespace) -> str:
    """Run everything that is not done yet. Returns the tables in Markdown."""
    out: Path = arguments.out
    data = [f"data.shards={prepare_data(out, arguments.workers)}", *arguments.settings]
    teacher = out / "runs" / "map" / "teacher"
    train_arm(teacher, CONFIGS / "map_teacher.yaml", data)
    losses = load_manifest(teacher / "trajectory").losses
    names = [BASE, *(name for name in arguments.arms if name != BASE)]
    cells = [Cell(*c) for c in itertools.product(arguments.budgets, arguments.temperatures, arguments.widths)]
    for cell, seed in itertools.product(cells, arguments.seeds):
        known = arms(teacher / "trajectory", losses, cell.budget)
        for name in names:
            settings = [*data, f"seed={seed}", *cell.settings(), *known[name].settings]
            train_arm(folder_of(out, cell, name, seed), CONFIGS / "map_student.yaml", settings)
    found = {
        cell: {
            name: [outcome(folder_of(out, cell, name, seed)) for seed in arguments.seeds] for name in names
        }
        for cell in cells
    }
    save_results(out / "map.json", {"seeds": arguments.seeds, "cells": {c.name: found[c] for c in cells}})
    titles = {name: known[name].title for name in names}
    plot(found, titles, out / "map.png")
    tables = [cell_table(cell, arms_found, titles) for cell, arms_found in found.items()]
    return "\n\n".join([*tables, f"picture: {out}/map.png   figures: {out}/map.json"])


def folder_of(out: Path, cell: Cell, arm: str, seed: int) -> Path:
    return out / "runs" / "map" / cell.name / f"{arm}_seed{seed}"


def outcome(run_dir: Path) -> dict[str, Any]:
    """Validation loss and top-1 of a finished run, and its top-1 at half of the budget."""
    result = read_result(run_dir)
    assert result is not None, f"{run_dir} has not been trained to its end"
    steps, accuracies = curve(run_dir, "accuracy")
    return {
        "hard": result["hard"],
        "accuracy": result["accuracy"],
        "accuracy_half": accuracies[len(steps) // 2 - 1],
    }


def gains(arms_found: Mapping[str, Sequence[Mapping[str, float]]], arm: str, key: str) -> list[float]:
    """What an arm has more than one-shot, for every seed."""
    return [a[key] - b[key] for a, b in zip(arms_found[arm], arms_found[BASE], strict=True)]


def cell_table(
    cell: Cell, arms_found: Mapping[str, Sequence[Mapping[str, float]]], titles: Mapping[str, str]
) -> str:
    """A Markdown line an arm: its seeds, then their paired difference from one-shot with Student's t."""
    lines = [
        f"**{cell.title}**\n",
        "| | top-1, every seed | mean | points over one-shot, every seed | mean ± sd (t) | at half | nats over one-shot (t) |",
        "|---" * 7 + "|",
    ]
    for name, runs in arms_found.items():
        top1 = [100 * run["accuracy"] for run in runs]
        cells = [titles[name], ", ".join(f"{v:.2f}" for v in top1), f"{mean_and_spread(top1)[0]:.2f}"]
        if name == BASE:
            lines.append(f"| {' | '.join(cells)} | | | | |")
            continue
        points, half, nats = (gains(arms_found, name, key) for key in ("accuracy", "accuracy_half", "hard"))
        cells += [
            ", ".join(f"{100 * v:+.2f}" for v in points),
            _spread_and_t([100 * v for v in points]),
            f"{100 * mean_and_spread(half)[0]:+.2f}",
            _mean_and_t(nats),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread_and_t(values: Sequence[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:+.2f}" if len(values) == 1 else f"{mean:+.2f} ± {spread:.2f} ({paired_t(values):.1f})"


def _mean_and_t(values: Sequence[float]) -> str:
    mean = mean_and_spread(values)[0]
    return f"{mean:+.3f}" if len(values) == 1 else f"{mean:+.3f} ({paired_t(values):.1f})"


def plot(
    found: Mapping[Cell, Mapping[str, Sequence[Mapping[str, float]]]], titles: Mapping[str, str], path: Path
) -> None:
    """Points of top-1 over one-shot, a panel a cell, a line an arm, every seed a dot, as a PNG."""
    names = [name for name in titles if name != BASE]
    if not names:
        return
    height = 1.2 + 0.3 * len(names)
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(3 + 2.6 * len(found), height), sharex=True, sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axis, (cell, arms_found) in zip(axes[0], found.items(), strict=True):
        for row, name in enumerate(names):
            points = [100 * gain for gain in gains(arms_found, name, "accuracy")]
            axis.plot(points, [row] * len(points), "o", color="C0", alpha=0.5)
            axis.plot([mean_and_spread(points)[0]], [row], "|", color="black", markersize=16)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set(title=cell.title.replace(", ", "\n", 1), xlabel="points of top-1 over one-shot")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), [titles[name] for name in names])
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)  # in the tables' order
    save_figure(figure, path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(arms(Path(), {25: 6.0, 100: 5.0, 400: 4.0}, 1000))
    add = parser.add_argument
    add("--out", type=Path, default=Path("work/demo"), help="folder of the demo (default work/demo)")
    add("--budgets", type=int, nargs="+", default=[1000], help="student steps (default 1000)")
    add("--temperatures", type=float, nargs="+", default=[1.0], help="0: the teacher's arg-max (default 1)")
    add(
        "--widths",
        type=int,
        nargs="+",
        default=[16],
        help="of the student; the teacher's is 64 (default 16)",
    )
    add(
        "--arms",
        nargs="+",
        choices=names,
        default=names,
        metavar="ARM",
        help=f"of {', '.join(names)} (default all)",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students (default 0 1 2)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that prepare the data")
    add("settings", nargs="*", metavar="key=value", help="settings for every run")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    return told(lambda: study(arguments))


if __name__ == "__main__":
    sys.exit(main())
