"""How few samples a teacher must have answered: forward KL, comparative distillation, both, by share of scored samples.

    python -m distill.experiments.few_teacher_calls --out work/objectives       # one CPU core, about half an hour

The question of CKD (2311.02253, WACV 2025), for a causal model: the student is trained for the same number of steps
on as many samples as one pass would take, or 30, 10, 3 % of them, each of which the teacher answers once. A
causal model's question does not change from epoch to epoch (nothing is masked), so a live teacher's answers are to
the bit those that would be stored, and nothing is gained by storing them here. Teacher and text are those of
`distill.experiments.objectives`, in the same folder. Ends in a table and few_teacher_calls.json; goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import ShardReader, write_shards
from distill.experiments.arms import save_results, table, told, train_arm
from distill.experiments.objectives import prepare_shards, student_config, train_teacher
from distill.experiments.wiki_books import CONFIGS

SHARES = (1.0, 0.3, 0.1, 0.03)
ARMS: dict[str, dict[str, float]] = {
    "labels": {"hard": 1},
    "KL": {"forward_kl": 1},
    "CKD": {"hard": 0.5, "ckd": 0.5},
    "KL and CKD": {"forward_kl": 0.5, "ckd": 0.5},
}


def study(out: Path, seeds: list[int], settings: list[str]) -> str:
    """Run every student that is not done yet. Returns the table in Markdown."""
    whole = prepare_shards(out)
    train_teacher(out, whole, settings)
    budget = student_config(out, out, {"hard": 1}, settings).total_samples
    results: dict[str, list[dict[str, Any]]] = {arm: [{} for _ in seeds] for arm in ARMS}
    for share in SHARES:
        number = round(share * budget)
        shards = fewer_samples(whole, out / f"shards_{number}", number)
        for arm, weights in ARMS.items():
            for i, seed in enumerate(seeds):
                folder = out / "few" / f"{arm.replace(' ', '_')}_{number}_seed{seed}"
                lines = [f"data.shards={shards}", f"seed={seed}", f"objective.weights={json.dumps(weights)}"]
                if arm != "labels":
                    lines.append(f"teacher.trajectory={out / 'teacher' / 'trajectory'}")
                found = train_arm(folder, CONFIGS / "objectives_student.yaml", [*lines, *settings])
                results[arm][i] |= {column(share): found["hard"]}
    save_results(out / "few_teacher_calls.json", {"budget": budget, "seeds": seeds, "arms": results})
    columns = {column(share): f"{share:.0%} ({round(share * budget):,} samples)" for share in SHARES}
    return table(results, {arm: arm for arm in ARMS}, columns)


def column(share: float) -> str:
    return f"hard_{share:g}"


def fewer_samples(whole: Path, folder: Path, number: int) -> Path:
    """Shards of `number` training samples spread evenly over those of `whole`, with all of its validation samples."""
    if (folder / "index.json").exists():
        return folder
    reader = ShardReader(whole, "train")
    if number > len(reader):
        raise ValueError(
            f"{whole} has {len(reader)} samples, the budget asks for {number}: set steps to less"
        )
    splits = {"train": samples_of(reader, number), "validation": samples_of(ShardReader(whole, "validation"))}
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write_shards(temporary, splits, reader.index.tokenizer, sequence_length=reader.index.sequence_length)
    shutil.copytree(whole / "tokenizer", temporary / "tokenizer")
    temporary.rename(folder)
    return folder


def samples_of(reader: ShardReader, number: int | None = None) -> Iterator[np.ndarray]:
    number = len(reader) if number is None else number
    for i in range(number):
        yield reader[i * len(reader) // number]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work/objectives"), help="folder of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and sample order")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every run")
    arguments = parser.parse_args()
    return told(lambda: study(arguments.out, arguments.seeds, arguments.settings))


if __name__ == "__main__":
    sys.exit(main())
