"""What the probes found as a table, a picture and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from distill.probes.selectors import picks

Row = Mapping[str, Any]
COLUMNS = {"loss": "loss", "accuracy": "top-1", "brier": "Brier", "ece": "ECE"}


def table(rows: Sequence[Row], sizes: Sequence[int]) -> str:
    """A Markdown line a checkpoint; M_robust and M_close are median [lower, upper quartile]."""
    names = [f"{kind}_{n}" for n in sizes for kind in ("robust", "close")]
    titles = [f"M_{name.split('_')[0]}({name.split('_')[1]})" for name in names]
    lines = [
        f"| step | {' | '.join([*COLUMNS.values(), *titles])} |",
        "|---" * (1 + len(COLUMNS) + len(names)) + "|",
    ]
    for row in rows:
        cells = [f"{row[key]:.4f}" for key in COLUMNS]
        cells += ["{1:.4f} [{0:.4f}, {2:.4f}]".format(*row[name]) for name in names]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bucket_table(rows: Sequence[Row]) -> str:
    """Loss / top-1 by the label's frequency rank, a Markdown line a checkpoint."""
    names = [key.removeprefix("loss_rank_") for key in rows[-1] if key.startswith("loss_rank_")]
    lines = [f"| step | {' | '.join(f'rank {name}' for name in names)} |", "|---" * (1 + len(names)) + "|"]
    for row in rows:
        cells = [f"{row[f'loss_rank_{n}']:.3f} / {row[f'accuracy_rank_{n}']:.3f}" for n in names]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selector_table(rows: Sequence[Row]) -> str:
    """What each checkpoint knows and how hard it is to follow, a Markdown line each; then the pick of each selector."""
    lines = ["| step | about a token read | about the label | sum | complexity |", "|---" * 5 + "|"]
    for row in rows:
        read, label = row["information_input"], row["information_label"]
        lines.append(
            f"| {row['step']} | {read:.4f} | {label:.4f} | {read + label:.4f} | {row['complexity']:.4f} |"
        )
    chosen = [f"most for {name}: step {step}, {why}" for name, (step, why) in picks(rows).items()]
    return "\n".join([*lines, "", *chosen])


def plot(rows: Sequence[Row], sizes: Sequence[int], picked: int | None, heading: str, path: Path) -> None:
    """Loss and top-1, M_robust, M_close, calibration over the teacher's steps (log scale), as a PNG."""
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    steps = [row["step"] for row in rows]
    _lines(axes[0, 0], steps, rows, {"loss": "log-loss (nats a token)", "accuracy": "top-1"})
    _lines(axes[0, 1], steps, rows, {"brier": "Brier score", "ece": "expected calibration error"})
    for axis, kind in ((axes[1, 0], "robust"), (axes[1, 1], "close")):
        for n in sizes:
            lower, median, upper = zip(*(row[f"{kind}_{n}"] for row in rows), strict=True)
            (line,) = axis.plot(steps, median, marker=".", label=f"n = {n}")
            axis.fill_between(steps, lower, upper, color=line.get_color(), alpha=0.1)
        axis.set_ylabel(f"M_{kind}: total variation, median and quartiles")
    for axis in axes.flat:
        axis.set(xscale="log", xlabel="teacher steps")
        axis.grid(alpha=0.3)
        if picked is not None:
            axis.axvline(picked, color="black", linestyle="--", linewidth=1, label=f"suggested: {picked}")
        axis.legend()
    figure.suptitle(heading)
    save_figure(figure, path)


def nonterminal_table(rows: Sequence[Row], majority: Sequence[float]) -> str:
    """A Markdown line a checkpoint: how often the ancestor on each level is named right, at the ends of its spans."""
    shown = {"commonest symbol": majority} | {str(row["step"]): row["nonterminals"]["ends"] for row in rows}
    lines = [
        f"| step | {' | '.join(f'level {k + 1}' for k in range(len(majority)))} |",
        "|---" * (1 + len(majority)) + "|",
    ]
    lines += [f"| {name} | {' | '.join(f'{v:.3f}' for v in values)} |" for name, values in shown.items()]
    return "\n".join(lines)


def plot_nonterminals(rows: Sequence[Row], heading: str, path: Path) -> None:
    """What `nonterminal_table` shows, over the teacher's steps (log scale), as a PNG."""
    figure, axis = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    steps = [row["step"] for row in rows]
    for level, values in enumerate(zip(*(row["nonterminals"]["ends"] for row in rows), strict=True), 1):
        axis.plot(steps, values, marker=".", label=f"level {level}")
    axis.set(
        xscale="log", xlabel="teacher steps", ylabel="non-terminal named right, at the ends of its spans"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.suptitle(heading)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all, and close the figure."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    pyplot.close(figure)


def _lines(axis: Any, steps: Sequence[int], rows: Sequence[Row], titles: Mapping[str, str]) -> None:
    for key, title in titles.items():
        axis.plot(steps, [row[key] for row in rows], marker=".", label=title)
