"""Sentences of a context-free grammar: a teacher and its trajectory -> probes -> students -> table and picture.

    python -m distill.experiments.pcfg                                # masked, 2 CPU cores: see the log for the minutes
    python -m distill.experiments.pcfg --task clm --out work/pcfg_clm
    python -m distill.experiments.pcfg --size paper --budget 4000     # cfg3b in full, for a GPU

Section 4 of Panigrahi et al. (ICLR 2025). All arms of a seed share data order, budget and initial weights; they
differ in the objective and the schedule alone. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.grammars import NAMES
from distill.experiments.arms import (
    Arm,
    curve,
    mean_and_spread,
    paired_t,
    plot,
    run_command,
    save_results,
    table,
    told,
    train_arm,
)
from distill.probes.report import nonterminal_table
from distill.probes.trajectory import RESULTS, ProbeSettings
from distill.probes.transition import Suggestion, suggest_schedule

CONFIGS = Path(__file__).parent.parent / "configs"
TASKS = {"mlm": "cfg3b", "clm": "cfg3f"}  # and the grammar that the paper uses it with
COLUMNS = {
    "accuracy_third": "top-1 at a third",
    "accuracy_two_thirds": "at two thirds",
    "accuracy": "at the end",
    "hard": "validation loss",
    "minutes": "minutes",
}


@dataclass(frozen=True)
class Size:
    """A scale of the experiment: the grammar's levels, training sentences, teacher checkpoints of `progressive`."""

    levels: int
    train: int
    stages: int
    probed_sentences: int


SIZES = {"mini": Size(3, 200_000, 12, 64), "paper": Size(6, 4_096_000, 8, 1024)}


def arms(trajectory: Path, stages: int, found: Suggestion | None, steps: Sequence[int]) -> dict[str, Arm]:
    """All students, by name; those with two teachers need the transition that the probes found."""
    taught = f"teacher.trajectory={trajectory}"
    known = [
        Arm("hard", "hard labels", ()),
        Arm("one_shot", "one-shot (final teacher)", (taught, "schedule.kind=one_shot")),
        Arm("progressive", "progressive", (taught, "schedule.kind=equal", f"schedule.num_stages={stages}")),
    ]
    if found:
        late = min(step for step in steps if step >= (found.early + found.final) // 2)
        for name, early in (("before", steps[0]), ("inside", found.early), ("after", late)):
            settings = ("schedule.kind=two_shot", f"schedule.checkpoints=[{early},{found.final}]")
            title = f"2-shot {name} the transition (step {early}, 10 %)"
            known.append(Arm(f"two_shot_{name}", title, (taught, *settings)))
    return {arm.name: arm for arm in known}


def prepare_data(out: Path, size: Size, grammar: str, workers: int) -> Path:
    """Make the sentences. Returns their folder. Raises ValueError if it holds those of another grammar or size."""
    shards, index = out / "shards", out / "shards" / "index.json"
    if not index.exists():
        run_command("data_prep", "pcfg", grammar, "--levels", str(size.levels), "--train", str(size.train),
                    "--out", str(shards), "--workers", str(workers))  # fmt: skip
    made = json.loads(index.read_text())["settings"]
    asked = {"grammar": grammar, "levels": size.levels, "train": size.train}
    if made | asked != made:
        raise ValueError(f"{shards} was made with {made}, now {asked} is asked for: choose another --out")
    return shards


def probe_teacher(teacher: Path, out: Path, sentences: int) -> dict[str, Any]:
    """n-gram and non-terminal probes of every checkpoint. Returns {"rows", "chance", "majority"}."""
    asked = ("--nonterminals", "--sequences", str(sentences), "--places", str(ProbeSettings.places))
    run_command("distill", "probe", str(teacher / "trajectory"), str(teacher / "config.yaml"),
                "--out", str(out / "probe"), *asked)  # fmt: skip
    found = json.loads((out / "probe" / RESULTS).read_text())
    return {"rows": found["checkpoints"], "chance": found["chance"], "majority": found["majority"]}


def study(arguments: argparse.Namespace) -> str:
    """Run everything that is not done yet. Returns the tables in Markdown."""
    out, size, task = arguments.out, SIZES[arguments.size], arguments.task
    shards = prepare_data(out, size, arguments.grammar or TASKS[task], arguments.workers)
    configs = {role: CONFIGS / f"pcfg_{arguments.size}_{task}_{role}.yaml" for role in ("teacher", "student")}
    common = [f"data.shards={shards}", *arguments.settings]
    teacher = out / "runs" / "teacher"
    results: dict[str, Any] = {"teacher": [train_arm(teacher, configs["teacher"], common)]}
    probed = probe_teacher(teacher, out, size.probed_sentences)
    steps = [row["step"] for row in probed["rows"]]
    needs_transition = any(name.startswith("two_shot") for name in arguments.arms)
    found = suggest_schedule(probed["rows"], probed["chance"]) if needs_transition else None
    known = arms(teacher / "trajectory", size.stages, found, steps)
    budget = [f"steps={arguments.budget}"] if arguments.budget else []
    shorter = f"_{arguments.budget}steps" if arguments.budget else ""
    folders: dict[str, list[Path]] = {name: [] for name in arguments.arms}
    for seed in arguments.seeds:  # a seed's arms together, so that a study cut short can be compared
        for name in arguments.arms:
            folders[name].append(out / "runs" / f"{name}{shorter}_seed{seed}")
            settings = [*common, f"seed={seed}", *known[name].settings, *budget]
            results.setdefault(name, []).append(student(folders[name][-1], configs["student"], settings))
    titles = {"teacher": "teacher (its own run)"} | {name: known[name].title for name in arguments.arms}
    save_results(
        out / f"results{shorter}.json", {"seeds": arguments.seeds, "runs": results, "probes": probed}
    )
    plot(
        folders,
        titles,
        teacher,
        out / f"curves{shorter}.png",
        f"PCFG, {arguments.size}, {task}, student seeds {arguments.seeds}",
    )
    parts = [
        table(results, titles, COLUMNS),
        difference(results),
        nonterminal_table(probed["rows"], probed["majority"]),
        f"pictures: {out}/*.png, {out}/probe   figures: {out}/results{shorter}.json",
    ]
    return "\n\n".join(part for part in parts if part)


def student(run_dir: Path, config: Path, settings: list[str]) -> dict[str, Any]:
    """`train_arm`, with top-1 on the way."""
    result = train_arm(run_dir, config, settings)
    on_the_way = {f"accuracy_{name}": accuracy_at(run_dir, share) for name, share in
                  (("third", 1 / 3), ("two_thirds", 2 / 3))}  # fmt: skip
    return {**result, **on_the_way}


def accuracy_at(run_dir: Path, share: float) -> float:
    """Validation top-1 at the last validation within `share` of the run's steps."""
    steps, values = curve(run_dir, "accuracy")
    return max(
        pair for pair in zip(steps, values, strict=True) if pair[0] <= max(share * steps[-1], steps[0])
    )[1]


def difference(results: dict[str, Any]) -> str:
    """Progressive minus one-shot at a third of the budget, in points, for every seed; Student's t of the mean."""
    if not {"progressive", "one_shot"} <= results.keys():
        return ""
    key = "accuracy_third"
    points = [
        100 * (p[key] - o[key]) for p, o in zip(results["progressive"], results["one_shot"], strict=True)
    ]
    shown = ", ".join(f"{p:+.1f}" for p in points)
    line = f"progressive minus one-shot at a third of the budget: {shown} points of top-1"
    if len(points) == 1:
        return line
    mean, spread = mean_and_spread(points)
    return f"{line}, mean {mean:+.2f} ± {spread:.2f}, paired t = {paired_t(points):.2f} ({len(points) - 1} degrees of freedom)"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(arms(Path(), 1, Suggestion(1, 1, 0.1, ()), [1]))
    parser.add_argument(
        "--out", type=Path, default=Path("work/pcfg"), help="folder for sentences, runs, table, pictures"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="mini", help="mini for CPU (default), paper for a GPU"
    )
    parser.add_argument("--task", choices=TASKS, default="mlm", help="masked (default) or causal")
    parser.add_argument(
        "--grammar", choices=NAMES, help="default: the paper's, cfg3b masked and cfg3f causal"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students (default 0 1 2)"
    )
    parser.add_argument(
        "--arms", nargs="+", choices=names, default=names[:3], help=f"default: {' '.join(names[:3])}"
    )
    parser.add_argument("--budget", type=int, help="steps of the students (default: their config's)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that make the sentences"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every run")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    return told(lambda: study(arguments))


if __name__ == "__main__":
    sys.exit(main())
