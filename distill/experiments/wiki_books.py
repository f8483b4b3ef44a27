"""Wikipedia + Books: raw text -> shards -> a teacher and its trajectory -> three students -> table, picture.

    python -m distill.experiments.wiki_books --out work/demo            # 2 CPU cores, about ten minutes
    python -m distill.experiments.wiki_books --out work/demo --seeds 0 1 2

Section 5 of Panigrahi et al. (ICLR 2025), scaled to a laptop. All arms share data order, budget and initial
weights (the seed's); they differ in the objective and the schedule alone. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from distill.experiments.arms import (
    Arm,
    dtype_for_this_cpu,
    plot,
    run_command,
    save_results,
    steps_to,
    table,
    told,
    train_arm,
)

CONFIGS = Path(__file__).parent.parent / "configs"
SEQUENCE_LENGTH, VOCAB_SIZE = "64", "1024"
COLUMNS = {
    "hard": "validation loss",
    "accuracy": "top-1",
    "steps_to_hard": "steps to the hard labels' final loss",
    "minutes": "minutes",
}


def arms(trajectory: Path) -> list[Arm]:
    """The three students of the paper's comparison."""
    taught = f"teacher.trajectory={trajectory}"
    return [
        Arm("hard", "hard labels", ()),
        Arm("one_shot", "one-shot (final teacher)", (taught, "schedule.kind=one_shot")),
        Arm("progressive", "progressive", (taught, "schedule.kind=equal", "schedule.num_stages=10")),
    ]


def prepare_data(out: Path, workers: int) -> Path:
    """Fetch the demo's text and make shards of it. Returns their folder."""
    text, shards = out / "text", out / "shards"
    if (shards / "index.json").exists():
        return shards
    flags = ("--workers", str(workers))
    run_command("data_prep", "fetch", "demo", "--out", str(text))
    dumps = [str(p) for p in sorted((text / "wikipedia").glob("*.bz2"))]
    run_command("data_prep", "wikipedia", *dumps, "--out", str(out / "wikipedia"), *flags)
    run_command("data_prep", "books", str(text / "books"), "--out", str(out / "books"), *flags)
    run_command("data_prep", "documents", str(out / "wikipedia"), str(out / "books"), "--out", str(out / "documents"),
                "--validation-share", "0.04", *flags)  # fmt: skip
    run_command("data_prep", "tokenizer", str(out / "documents"), "--out", str(out / "tokenizer"),
                "--vocab-size", VOCAB_SIZE, "--model", "bpe")  # fmt: skip
    run_command("data_prep", "shards", str(out / "documents"), "--tokenizer", str(out / "tokenizer"), "--out", str(shards),
                "--sequence-length", SEQUENCE_LENGTH, *flags)  # fmt: skip
    return shards


def study(out: Path, seeds: list[int], workers: int, settings: list[str]) -> str:
    """Run everything that is not done yet, all runs with `settings` on top. Returns the table in Markdown."""
    shards = prepare_data(out, workers)
    teacher_dir = out / "runs" / "teacher"
    settings = [*dtype_for_this_cpu(teacher_dir), *settings]
    results: dict[str, list[Any]] = {
        "teacher": [
            train_arm(teacher_dir, CONFIGS / "demo_teacher.yaml", [f"data.shards={shards}", *settings])
        ]
    }
    titles, folders = {"teacher": "teacher (its own run)"}, {}
    for arm in arms(teacher_dir / "trajectory"):
        titles[arm.name] = arm.title
        folders[arm.name] = [out / "runs" / f"{arm.name}_seed{seed}" for seed in seeds]
        results[arm.name] = [
            train_arm(
                folder,
                CONFIGS / "demo_student.yaml",
                [f"data.shards={shards}", f"seed={seed}", *arm.settings, *settings],
            )
            for seed, folder in zip(seeds, folders[arm.name], strict=False)
        ]
    for arm_name, runs in folders.items():
        for found, folder, hard in zip(results[arm_name], runs, results["hard"], strict=False):
            found["steps_to_hard"] = steps_to(folder, hard["hard"])
    plot(
        folders,
        titles,
        teacher_dir,
        out / "curves.png",
        f"Wikipedia + Books at demo scale, student seeds {seeds}",
    )
    save_results(out / "results.json", results)
    places = f"picture: {out}/curves.png   figures: {out}/results.json   TensorBoard: tensorboard --logdir {out}/runs"
    return f"{table(results, titles, COLUMNS)}\n\n{places}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("work/demo"), help="folder for text, shards, runs, table and picture"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="seeds of the students: weights, sample order and masks",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that prepare the data"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings for every run, e.g. engine.dtype=fp32"
    )
    arguments = parser.parse_args()
    return told(lambda: study(arguments.out, arguments.seeds, arguments.workers, arguments.settings))


if __name__ == "__main__":
    sys.exit(main())
