"""The same tiny student under each objective: data, seed and budget are equal, `objective.weights` alone differ.

    python -m distill.experiments.objectives --out work/objectives              # one CPU core, about half an hour

The student is a causal model on the demo's text (`distill.experiments.wiki_books`, whose shards are made if they are not
there); its teacher is trained first. Ends in a table and results.json. What is finished is not done again. CPU seconds
are of the process and its threads, with the start and two validations, about the same for all; the peak of memory
has the libraries in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.config import Config
from distill.config_reader import load_config
from distill.data import Samples, validation_batches
from distill.evaluate import validation_samples
from distill.experiments.arms import run_command, save_results, table, told, train_arm
from distill.experiments.wiki_books import CONFIGS, prepare_data
from distill.files import write_text
from distill.models import DTYPES, counted_rows, quiet_transformers
from distill.objectives.seen import log_probabilities
from distill.pretrained import load_model
from distill.probes.quality import bucket_names, frequency_ranks, measure
from distill.run_folder import refuse_other_settings
from distill.signals import Stopped, catch_stop_signals
from distill.train import train

FOUND = "found.json"
# Each paper's own mixture where it has one; else the term beside the forward KL, at a weight of its size.
ARMS: dict[str, dict[str, Any]] = {
    "hard labels": {"hard": 1},
    "forward_kl": {"forward_kl": 1},
    "forward_kl, hard": {"forward_kl": 0.9, "hard": 0.1},
    "reverse_kl": {"reverse_kl": 1},
    "jsd": {"jsd": 1},
    "tvd": {"tvd": 1},
    "atkd": {"atkd": 1},
    "rld": {"hard": 1, "rld": 1},
    "pearson": {"hard": 1, "pearson": 1},
    "spearman": {"hard": 1, "spearman": 1},
    "clkd": {"hard": 1, "clkd": 1},
    "cmkd": {"hard": 1, "cmkd": 1},
    "gate": {"gate": 1},
    "gate_learned": {"gate_learned": 1},
    "ada_alpha": {"ada_alpha": 1},
    "ada_margin": {"ada_margin": 1},
    "excess_loss": {"excess_loss": 1},
    "cross_head": {"forward_kl": 0.5, "cross_head": 0.5},
    "ckd": {"forward_kl": 0.5, "ckd": 0.5},
    "ckd_hidden": {"forward_kl": 0.9, "ckd_hidden": 0.1},
    "double": {"forward_kl": 0.5, "double": 0.5},
    "double_pairs": {"forward_kl": 0.5, "double_pairs": 0.5},
    "double_sampled": {"forward_kl": 0.5, "double_sampled": 0.5},
    "hidden_cosine": {"forward_kl": 0.625, "hard": 0.25, "hidden_cosine": 0.125},
    "hidden_square": {"forward_kl": 0.9, "hidden_square": 0.1},
    "attention_kl": {"forward_kl": 0.9, "attention_kl": 0.1},
    "curriculum": {"forward_kl": 0.9, "curriculum": 0.1},
    "dpk": {"forward_kl": 0.9, "dpk": 0.1},
    "relations": {"forward_kl": 0.9, "relations": 0.1},
    "contrastive": {"forward_kl": 0.9, "contrastive": 0.1},
    "mixkd": {"forward_kl": 0.5, "mixkd": 0.5},
    "kdiga": {"forward_kl": 0.9, "kdiga": 0.1},
}
COLUMNS = {
    "hard": "validation loss",
    "accuracy": "top-1",
    "ece": "calibration error",
    "agreement": "top-1 as the teacher's",
    "teacher_kl": "KL from the teacher",
    "hard_frequent": "loss, 10 most frequent",
    "hard_middle": "11-100",
    "hard_rare": "rarer",
    "cpu_seconds": "CPU seconds",
    "mib": "peak MiB",
}


def study(out: Path, arms: list[str], seeds: list[int], settings: list[str]) -> str:
    """Run every arm that is not done yet. Returns the table in Markdown."""
    shards = prepare_shards(out)
    train_teacher(out, shards, settings)
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        for seed in seeds:
            found = run_folder(out, arm, seed) / FOUND
            if not found.exists():
                flags = ("--out", str(out), "--one", arm, "--seeds", str(seed))
                # Settings first: --seeds would take them for seeds.
                run_command("distill.experiments.objectives", *settings, *flags)
            refuse_other_settings(student_config(out, found.parent, ARMS[arm], [f"seed={seed}", *settings]))
            results.setdefault(arm, []).append(json.loads(found.read_text()))
    save_results(out / "results.json", results)
    return table(results, {arm: title(arm) for arm in arms}, COLUMNS)


def prepare_shards(out: Path) -> Path:
    """The demo's shards below `out`, made if they are not there."""
    return prepare_data(out / "demo", workers=1)


def train_teacher(out: Path, shards: Path, settings: list[str]) -> None:
    train_arm(out / "teacher", CONFIGS / "objectives_teacher.yaml", [f"data.shards={shards}", *settings])


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / "runs" / f"{arm.replace(', ', '_').replace(' ', '_')}_seed{seed}"


def title(arm: str) -> str:
    weights = ARMS[arm]
    return ", ".join(f"{weight:g} {name}" for name, weight in weights.items())


def student_config(out: Path, run_dir: Path, weights: dict[str, Any], settings: list[str]) -> Config:
    """The student's settings; those without a teacher's objective have no teacher."""
    taught = set(weights) != {"hard"}
    return load_config(
        [CONFIGS / "objectives_student.yaml"],
        [
            f"data.shards={out / 'demo' / 'shards'}",
            f"teacher.trajectory={out / 'teacher' / 'trajectory' if taught else json.dumps('')}",
            *settings,
            f"run_dir={run_dir}",
            f"objective.weights={json.dumps(weights)}",
        ],
    )


def run_one(out: Path, arm: str, seed: int, settings: list[str]) -> None:
    """Train one student in this process, so that its peak of memory is the arm's, and leave what it is worth."""
    folder = run_folder(out, arm, seed)
    config = student_config(out, folder, ARMS[arm], [f"seed={seed}", *settings])
    start = time.process_time()  # of the processor: other work on the machine lengthens no run of this
    result = train(config)
    seconds = time.process_time() - start
    costs = {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "cpu_seconds": seconds}
    write_text(folder / FOUND, json.dumps({**result, **costs, **worth(out, folder, config)}))


def worth(out: Path, folder: Path, config: Config) -> dict[str, float]:
    """The exported student's figures on held-out documents, and how near it is to the teacher there."""
    quiet_transformers()
    samples = validation_samples(config)
    models = [
        load_model(config.data.task, path, DTYPES["fp32"], samples.sequence_length)
        for path in (folder / "model", out / "teacher" / "model")
    ]
    ranks = frequency_ranks(Samples(config.data, "train", 0, shuffle=False).reader)
    limit, micro = config.log.eval_samples, config.batch_size
    found = measure(models[0], samples, ranks, limit, micro)
    frequent, middle, *rare = bucket_names(len(ranks))
    return {
        "ece": found["ece"],
        "hard_frequent": found[f"loss_rank_{frequent}"],
        "hard_middle": found[f"loss_rank_{middle}"],
        "hard_rare": found[f"loss_rank_{rare[0]}"],
        **nearness(models[0], models[1], samples, limit, micro),
    }


@torch.no_grad()
def nearness(
    student: PreTrainedModel, teacher: PreTrainedModel, samples: Samples, limit: int, micro: int
) -> dict[str, float]:
    """Means over the counted validation rows: share of equal arg-max, KL(teacher || student) in nats."""
    same, apart, number = 0.0, 0.0, 0
    for batch in validation_batches(samples, limit, micro, 0, 1):
        logs = []
        for model in (student, teacher):
            rows = counted_rows(model, batch.inputs, batch.rows_N)
            logs.append(log_probabilities(rows.hidden_ND, rows.head, samples.tokenizer.vocab_size))
        own_NV, other_NV = logs
        same += float((own_NV.argmax(1) == other_NV.argmax(1)).sum())
        apart += float((other_NV.exp() * (other_NV - own_NV)).sum(dtype=torch.float64))
        number += len(batch.rows_N)
    return {"agreement": same / number, "teacher_kl": apart / number}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work/objectives"), help="folder of the study")
    parser.add_argument(
        "--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help="default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and sample order")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every run")
    arguments = parser.parse_args()
    if not arguments.one:
        return told(lambda: study(arguments.out, arguments.arms, arguments.seeds, arguments.settings))
    catch_stop_signals()
    try:
        run_one(arguments.out, arguments.one, arguments.seeds[0], arguments.settings)
    except Stopped as stopped:
        return 128 + stopped.signal_number
    return 0


if __name__ == "__main__":
    sys.exit(main())
