"""The `distill` command: parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config import Config, help_text
from distill.config_reader import load_config
from distill.signals import Cancelled, Stopped, catch_stop_signals, stop_signal
from distill.trajectory import commands as trajectory_commands
from distill.trajectory.storage import may_pass

MAY_PASS = 75  # exit code, of sysexits.h: to be tried again
TRAIN_HELP = """keys (defaults < YAML files < key=value):
{keys}

A ramp is a number or a list of [share of the budget, value].
Exit codes: 0 done, 2 bad input, 75 storage or a file system failed, 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1
(saved; the same command goes on).

example: distill train student.yaml run_dir=runs/student teacher.trajectory=runs/teacher/trajectory schedule.kind=equal"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distill", description="Pre-train a small language model from a teacher's trajectory."
    )
    # The deepspeed launcher passes it; the environment says it too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    train = commands.add_parser(
        "train",
        help="train a teacher or a student",
        formatter_class=raw,
        epilog=TRAIN_HELP.format(keys=help_text()),
    )
    train.add_argument(
        "settings",
        nargs="*",
        metavar="FILE.yaml | key=value",
        help="YAML files and assignments, later ones win",
    )

    add_score(commands)
    train.add_argument(
        "--help-objectives", action="store_true", help="list what objective.weights can name, and leave"
    )

    attempt = commands.add_parser(
        "attempt", help="for batch scripts: may this SLURM job start the run once more? Exit code 2: no"
    )
    attempt.add_argument(
        "when",
        choices=("start", "again", "stopped"),
        help="start: also note that it does so now; stopped: note that it was told to",
    )
    attempt.add_argument("settings", nargs="*", help="as for `distill train`")

    add_plan(commands)

    export = commands.add_parser("export", help="write a run's newest weights as a Hugging Face folder")
    export.add_argument("run_dir", type=Path, help="folder of the run")
    export.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")

    evaluate = commands.add_parser(
        "eval", help="validation loss (nats a token), top-1 and perplexity of a Hugging Face folder"
    )
    evaluate.add_argument("model", type=Path, help="folder of the model, e.g. runs/student/model")
    evaluate.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="at least data.shards=FOLDER; see `distill train --help`",
    )

    probe = commands.add_parser(
        "probe",
        help="what every checkpoint of a trajectory knows: n-grams, loss by word frequency, calibration",
        formatter_class=raw,
        epilog="example: distill probe runs/teacher/trajectory runs/teacher/config.yaml --suggest-schedule\n"
        "         distill probe s3://bucket/teacher data.shards=shards teacher.cache=/scratch/cache\n"
        "The settings give the data, as for `distill train`: data.shards, data.task, data.mask_rate, log.eval_samples;\n"
        "teacher.cache: where checkpoints that lie elsewhere are kept.",
    )
    probe.add_argument(
        "trajectory",
        help="folder or URL (s3://, gs://, az://, https://) with manifest.json; its files may lie elsewhere",
    )
    probe.add_argument(
        "settings", nargs="*", metavar="FILE.yaml | key=value", help="at least data.shards=FOLDER"
    )
    probe.add_argument(
        "--out", type=Path, default=Path("probe"), help="folder for probe.json, probe.png (default probe)"
    )
    probe.add_argument(
        "--ngrams",
        type=int,
        nargs="+",
        default=[2, 3, 4, 5],
        metavar="N",
        help="their sizes (default 2 3 4 5)",
    )
    probe.add_argument(
        "--sequences", type=int, default=128, help="validation sequences with hidden n-grams (default 128)"
    )
    probe.add_argument("--places", type=int, default=4, help="places in each of them (default 4)")
    probe.add_argument(
        "--steps", type=int, nargs="+", default=[], metavar="STEP", help="teacher steps (default: all)"
    )
    probe.add_argument(
        "--nonterminals",
        action="store_true",
        help="also how well its hidden states tell the grammar's symbols above each word: shards of `data_prep pcfg`",
    )
    probe.add_argument(
        "--select",
        action="store_true",
        help="pick one checkpoint by what it knows, and one by how easily the student of model.* follows it",
    )
    probe.add_argument(
        "--suggest-schedule",
        action="store_true",
        help="find the phase transition and write schedule.yaml, ready for `distill train`, with the reasons",
    )

    trajectory = commands.add_parser("trajectory", help="a teacher's checkpoints as one object")
    trajectory_commands.add_commands(trajectory)
    return parser


def add_score(commands: Any) -> None:
    score = commands.add_parser(
        "score",
        help="store what the scheduled teacher says of every sample, once, for students to learn from",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: distill score student.yaml teacher.trajectory=runs/teacher/trajectory --out targets --codec sampled\n"
        "         distill train student.yaml teacher.targets=targets run_dir=runs/student",
    )
    score.add_argument(
        "settings", nargs="+", metavar="FILE.yaml | key=value", help="the student's, as for `distill train`"
    )
    add = score.add_argument
    add("--out", type=Path, required=True, help="folder of the targets; the same command goes on with it")
    add(
        "--codec",
        choices=("top_k", "top_p", "sampled", "hidden"),
        required=True,
        help="what is kept: the likeliest classes; as many as have mass P, at most K; random draws (RS-KD, unbiased); "
        "hidden states, exact and the largest",
    )
    add("--k", type=int, help="top_k, top_p: classes, at most (default 64, 100)")
    add("--p", type=float, help="top_p: their mass together, 0 to 1 (default 0.95)")
    add("--draws", type=int, help="sampled: draws a token (default 50)")
    add("--part", type=part, default=(0, 1), metavar="I/N", help="the I-th of N parts, from 0 (default 0/1)")
    add("--steps", type=count, default=0, help="score the first so many steps only (default: all)")
    add("--shard-samples", type=count, default=0, help="samples a shard (default 1024; hidden states 64)")


def part(text: str) -> tuple[int, int]:
    """I/N as two numbers."""
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I in 0..N-1, e.g. 0/4, got {text!r}")
    return int(number), int(parts)


def count(text: str) -> int:
    """A number of things."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="memory, storage, disk and time of a run before it starts, without a GPU or weights"
    )
    plan.add_argument("settings", nargs="*", help="as for `distill train`")
    add = plan.add_argument
    add("--ranks", type=int, default=8, help="GPUs in all (default 8)")
    add("--ranks-per-node", type=int, default=8, help="GPUs of a node (default 8)")
    add("--memory-gib", type=float, default=80.0, help="memory of one GPU, GiB (default 80)")
    add("--tokens-per-second", type=float, default=0.0, help="of all ranks; else as run_dir has measured")
    add("--tflops", type=float, default=0.0, help="that one GPU sustains, if no tokens a second are known")
    add("--storage-mb-per-second", type=float, default=0.0, help="MB/s that storage gives all nodes together")
    add("--vocab-size", type=int, default=0, help="of shards still to be made")
    add("--sequence-length", type=int, default=0, help="of shards still to be made")
    add("--teacher-config", type=Path, help="config.json of a teacher still to be fetched")


def run(arguments: argparse.Namespace) -> int:
    """Call the one function behind the command. Returns the exit code.

    Imports are here because torch takes seconds and --help should not.
    """
    if arguments.command == "train" and arguments.help_objectives:
        from distill.objectives.terms import help_text as help_of_objectives

        print(help_of_objectives())
    elif arguments.command == "train":
        config = config_of(arguments)  # first: a bad one is told at once
        from distill.train import train

        report(train(config))
    elif arguments.command == "score":
        run_score(arguments)
    elif arguments.command == "attempt":
        from distill.attempts import note_start, note_stop, refuse_standstill

        folder, job = Path(config_of(arguments).run_dir), os.environ["SLURM_JOB_ID"]
        if arguments.when == "again":
            refuse_standstill(folder, job)
        elif arguments.when == "stopped":
            note_stop(folder)
        else:
            print(f"{folder} goes on from step {note_start(folder, job)}")
    elif arguments.command == "plan":
        config = config_of(arguments)
        from distill.plan import Site, make_plan
        from distill.plan_text import plan_text

        site = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Site)}
        print(plan_text(make_plan(config, Site(**site))))
    elif arguments.command == "export":
        from distill.export import export_run

        print(export_run(arguments.run_dir, arguments.out))
    elif arguments.command == "eval":
        from distill.export import evaluate_folder

        report(evaluate_folder(arguments.model, load_config([], ["run_dir=.", *arguments.settings])))
    elif arguments.command == "probe":
        run_probe(arguments)
    elif arguments.command == "trajectory":
        return trajectory_commands.run(arguments)
    return 0


def run_score(arguments: argparse.Namespace) -> None:
    arguments.settings = ["run_dir=.", *arguments.settings]  # it needs none
    config = config_of(arguments)
    from distill.score import codec_for, score

    codec = codec_for(config, arguments.codec, arguments.k, arguments.p, arguments.draws)
    report(score(config, arguments.out, codec, arguments.part, arguments.steps, arguments.shard_samples))


def run_probe(arguments: argparse.Namespace) -> None:
    files = [s for s in arguments.settings if "=" not in s]
    config = load_config(
        files,
        [
            "run_dir=.",
            'teacher.trajectory=""',
            "objective.weights={}",
            *(s for s in arguments.settings if "=" in s),
        ],
    )
    from distill.build import student_model
    from distill.probes.nonterminals import NonterminalStudy
    from distill.probes.trajectory import SCHEDULE, ProbeSettings, probe, write_suggestion
    from distill.probes.trajectory import report as tables

    sizes = tuple(arguments.ngrams)
    grammar = NonterminalStudy() if arguments.nonterminals else None
    asked = ProbeSettings(sizes, arguments.sequences, arguments.places, tuple(arguments.steps), grammar)
    student = student_model if arguments.select else None
    found = probe(arguments.trajectory, config, asked, arguments.out, student)
    print(tables(found, sizes))
    if arguments.suggest_schedule:
        suggestion = write_suggestion(found, sizes, arguments.out)
        print("\n".join(["", *suggestion.reasons, f"schedule: {arguments.out / SCHEDULE}"]))


def config_of(arguments: argparse.Namespace) -> Config:
    files = [s for s in arguments.settings if "=" not in s]
    return load_config(files, [s for s in arguments.settings if "=" in s])


def report(result: Mapping[str, object]) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; settings may also come after options, which argparse by itself would refuse."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "settings") and all("=" in s and s[0] != "-" for s in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings = [*arguments.settings, *rest]
    return arguments


def main() -> int:
    """Entry point of `distill`; returns the exit code."""
    arguments = parse(sys.argv[1:])
    if arguments.command in ("train", "score"):  # the others have nothing to save
        catch_stop_signals()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return run(arguments)
    except Stopped as stopped:
        print(f"distill: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except Cancelled:
        print("distill: stopped by a signal while a teacher was fetched", file=sys.stderr)
        return 128 + stop_signal()
    # All that a user can mend has a sentence; faults of a disk name the file.
    except (ValueError, OSError) as error:
        print(f"distill: {error}", file=sys.stderr)
        return MAY_PASS if may_pass(error) else 2


if __name__ == "__main__":
    sys.exit(main())
