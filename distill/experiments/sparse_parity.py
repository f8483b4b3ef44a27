"""Sparse parity: teachers and their trajectories -> students of every arm -> table, claims, correlations, picture.

    python -m distill.experiments.sparse_parity                                  # R1: (60, 4), four seeds, minutes on 2 cores
    python -m distill.experiments.sparse_parity d=40 k=3 seeds=[0,1] --out work/small
    python -m distill.experiments.sparse_parity distill/configs/sparse_parity/paper_mlp.yaml --out work/parity_paper   # a GPU

Section 3 of Panigrahi et al. (ICLR 2025). All arms of a seed share data, budget and initial weights; they differ in
the schedule and the temperature alone. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from distill.config import fields_of
from distill.experiments.arms import save_results
from distill.experiments.parity.arms import make_arms, pick_checkpoints
from distill.experiments.parity.findings import claims, claims_table, correlations_table, table
from distill.experiments.parity.picture import draw
from distill.experiments.parity.probe import probe_trajectories
from distill.experiments.parity.runs import train_students, train_teachers
from distill.experiments.parity.settings import Settings, load_settings


def study(out: Path, settings: Settings) -> str:
    """Run what is not done yet. Returns the tables in Markdown.

    Raises:
        ValueError: (and its kinds) teachers without a phase transition, a folder of another study, a broken checkpoint.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teachers, trajectories = train_teachers(out, settings, device)
    picks = pick_checkpoints(settings, teachers)
    arms = make_arms(settings, picks)
    curves = train_students(out, settings, arms, trajectories, device)
    correlations = probe_trajectories(settings, trajectories, device)
    found = claims(settings, picks, curves, teachers, correlations)
    save_results(
        out / "results.json",
        {
            "settings": asdict(settings),
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": device.type,
            },
            "claims": found,
            "picks": [asdict(pick) for pick in picks],
            "teachers": asdict(teachers),
            "arms": {name: asdict(curve) for name, curve in curves.items()},
            "correlations": correlations,
        },
    )
    draw(out / "curves.png", settings, arms, curves, teachers, picks, correlations)
    minutes = f"minutes of training: teachers {teachers.seconds / 60:.1f}, students {curves['hard'].seconds / 60:.1f}"
    tables = [
        table(arms, curves, teachers),
        claims_table(found),
        correlations_table(settings, picks, correlations),
    ]
    return "\n\n".join([*tables, minutes])


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    keys = "\n".join(f"  {key}={value!r}" for key, _, value in fields_of(Settings()))
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"{Settings.__doc__}\n\nkeys and their defaults:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="FILE.yaml | key=value", help="later ones win")
    parser.add_argument(
        "--out", type=Path, default=Path("work/parity"), help="folder for runs, table and picture"
    )
    given = parser.parse_args(arguments)
    try:
        files = [s for s in given.settings if "=" not in s]
        tables = study(given.out, load_settings(files, [s for s in given.settings if "=" in s]))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last save", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"sparse_parity: {error}", file=sys.stderr)
        return 2
    print(f"{tables}\n\npicture: {given.out}/curves.png   figures: {given.out}/results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
