"""Arms of a comparison, each a `distill train` command; what they found as a table and a picture."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

from distill import hardware
from distill.config_reader import load_config
from distill.files import write_text
from distill.metrics import METRICS, read_rows
from distill.probes.report import save_figure
from distill.run_folder import read_result, refuse_other_settings, stored_settings

# Digits behind the point in a table, by what a result's key starts with; 0 for others.
DIGITS = {"hard": 3, "accuracy": 4, "minutes": 1, "ece": 3, "agreement": 3, "teacher_kl": 3, "cpu": 1}


@dataclass(frozen=True)
class Arm:
    """A way to train the student: its name, its title in the table, the settings that set it apart."""

    name: str
    title: str
    settings: tuple[str, ...]


class CommandFailed(Exception):
    """A command of the study ended with an error or was interrupted; the study leaves with the same exit code."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"stopped (exit code {code}); the same command goes on from there")


def run_command(module: str, *arguments: str) -> None:
    """Run `python -m module arguments...`, shown to the user first. Raises CommandFailed with its exit code."""
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    # OpenMP's threads spin while they wait, which beside any other load makes these small models five times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=sys.stderr, env=environment)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = None
    while code is None:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sent it to the command as well: let that save and leave
            continue
    signal.signal(signal.SIGTERM, previous)
    if code:
        raise CommandFailed(code if code > 0 else 128 - code)


def told(study: Callable[[], str]) -> int:
    """Run a study and print what it found. The exit code of its command."""
    try:
        print(f"\n{study()}")
    except CommandFailed as failure:
        print(failure, file=sys.stderr)
        return failure.code
    except ValueError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


def dtype_for_this_cpu(begun: Path) -> list[str]:
    """Settings for a study on CPU: fp32 where bf16 matrix products are emulated, which takes many times longer.

    A study whose run in `begun` has started, on whatever machine, keeps that run's.
    """
    if stored := stored_settings(begun):
        return [f"{key}={stored[key]}" for key in ("engine.dtype", "teacher.dtype")]
    return [] if hardware.cpu_multiplies(torch.bfloat16) else ["engine.dtype=fp32", "teacher.dtype=fp32"]


def train_arm(run_dir: Path, config: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Train one run to its end, unless that is done. Returns its result.json, and the minutes of training alone.

    Raises:
        RunFolderError: the folder holds a run of other settings.
    """
    settings = [f"run_dir={run_dir}", *settings]
    if read_result(run_dir) is None:
        run_command("distill", "train", str(config), *settings)
    refuse_other_settings(load_config([config], settings))
    seconds = sum(row["seconds"] for row in read_rows(run_dir / METRICS, "train"))
    return {**json.loads((run_dir / "result.json").read_text()), "minutes": seconds / 60}


def curve(run_dir: Path, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one validation metric of a run."""
    rows = read_rows(run_dir / METRICS, "validation")
    return [row["step"] for row in rows], [row[key] for row in rows]


def steps_to(run_dir: Path, loss: float) -> float:
    """First step, linear between validations, with a validation loss of at most `loss`; or infinity."""
    steps, losses = curve(run_dir, "hard")
    previous = None
    for step, value in zip(steps, losses, strict=False):
        if value <= loss:
            if previous is None:
                return float(step)
            before, above = previous
            return before + (step - before) * (above - loss) / (above - value)
        previous = (step, value)
    return math.inf


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def paired_t(differences: Sequence[float]) -> float:
    """Student's t of the mean of at least two paired differences against 0; infinite where they are all equal."""
    mean, spread = mean_and_spread(differences)
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (spread / math.sqrt(len(differences)))


def table(
    results: Mapping[str, Sequence[Mapping[str, float]]],
    titles: Mapping[str, str],
    columns: Mapping[str, str],
) -> str:
    """A Markdown line an arm; a cell is the mean over seeds, with the standard deviation if there are several.

    Args:
        columns: key of a result -> heading.
    """
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm, runs in results.items():
        cells = [_cell([run[key] for run in runs if key in run], key) for key in columns]
        lines.append(f"| {titles[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float], key: str) -> str:
    if not values:
        return ""
    if any(math.isinf(v) for v in values):
        return (
            "not reached"
            if all(math.isinf(v) for v in values)
            else f"reached by {sum(map(math.isfinite, values))} of {len(values)}"
        )
    digits = next((n for start, n in DIGITS.items() if key.startswith(start)), 0)
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def plot(
    runs: Mapping[str, Sequence[Path]], titles: Mapping[str, str], teacher: Path, path: Path, heading: str
) -> None:
    """Validation loss and top-1 of every run over its steps, and where the teacher ended, as a PNG."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, label in (
        (axes[0], "hard", "validation loss (nats a token)"),
        (axes[1], "accuracy", "validation top-1"),
    ):
        for i, (arm, folders) in enumerate(runs.items()):
            for j, folder in enumerate(folders):
                axis.plot(
                    *curve(folder, key), color=f"C{i}", marker=".", label=titles[arm] if j == 0 else None
                )
        axis.axhline(
            curve(teacher, key)[1][-1], color="black", linestyle="--", linewidth=1, label="teacher, final"
        )
        axis.set(xlabel="student steps", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(heading)
    save_figure(figure, path)


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(results, indent=1))
