"""Stored targets: bytes a token by codec, and a student's step from them against a plain hard-label step.

    python tests/bench/targets.py [--steps 24] [--vocab 8192] [--length 256]

One causal student and a teacher of its shape, of random weights on random text, as speed and bytes do not ask what is
learned. The teacher's logits are scaled until 50 draws of it are about 12 different tokens, as RS-KD reports of trained
ones. Each codec scores the same samples; then a student of each kind takes one step in turn, all in one process, so that
a busy machine strikes all alike. `ratio`: the median over rounds of a step over the hard-label step of the same round
(asked: <= 1.10); `live`: of the teacher itself. Targets are read in the training process, with nothing beside it: the
worst case. A row with all of it is appended to targets.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from measure import append_row, provenance, say  # noqa: E402

from data_prep.shards import TokenizerInfo, write_shards  # noqa: E402
from distill.accounting import Window  # noqa: E402
from distill.build import build_run  # noqa: E402
from distill.checkpoint import TrainState  # noqa: E402
from distill.config_reader import load_config  # noqa: E402
from distill.data import train_batches  # noqa: E402
from distill.distributed import start  # noqa: E402
from distill.models import build_model  # noqa: E402
from distill.objectives import Objective  # noqa: E402
from distill.targets.reader import TargetReader  # noqa: E402
from distill.train import train_step  # noqa: E402
from distill.trajectory.index import index_trajectory  # noqa: E402

CSV = Path(__file__).with_suffix(".csv")
CODECS = {
    "sampled": ["--codec", "sampled"],
    "top_64": ["--codec", "top_k", "--k", "64"],
    "top_p": ["--codec", "top_p"],
    "hidden": ["--codec", "hidden"],
}
WARM_UP = 2  # rounds
SHAPE = {"n_layer": 4, "n_embd": 256, "n_head": 4}


def make(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Shards and a teacher; the settings that all runs share."""
    rng, vocab, length = np.random.default_rng(0), arguments.vocab, arguments.length
    tokenizer = TokenizerInfo("5" * 64, vocab, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=4)
    number = arguments.steps * arguments.batch
    text = {s: rng.integers(5, vocab, (n, length)) for s, n in (("train", number), ("validation", 8))}
    write_shards(folder / "shards", text, tokenizer, sequence_length=length)
    tiny.write_tokenizer(folder / "shards" / "tokenizer")
    teacher = build_model(
        "clm", "gpt2", {**SHAPE, "n_positions": length}, vocab_size=vocab, sequence_length=length, special_ids={}, seed=1
    )  # fmt: skip
    sharpen(teacher, torch.from_numpy(text["train"][:2]))
    teacher.save_pretrained(folder / "teacher" / "step_1")
    index_trajectory(folder / "teacher")
    return [
        f"data.shards={folder / 'shards'}", "data.task=clm", "model.architecture=gpt2", "engine.dtype=fp32", "teacher.dtype=fp32",
        f"model.overrides={json.dumps({**SHAPE, 'n_positions': length})}", f"steps={arguments.steps}",
        f"batch_size={arguments.batch}", "log.every=1", "log.eval_every=100000", "save.every=100000", "log.eval_samples=8",
    ]  # fmt: skip


@torch.no_grad()
def sharpen(teacher: Any, tokens_BL: torch.Tensor) -> None:
    """Scale the final norm, hence the logits, until 50 draws are 12 different classes on average."""
    low, high = 1.0, 1000.0
    norm, weight = teacher.base_model.ln_f, teacher.base_model.ln_f.weight.clone()
    for _ in range(20):
        scale = (low * high) ** 0.5
        norm.weight.copy_(weight * scale)
        q = torch.softmax(teacher(input_ids=tokens_BL).logits[:, ::16], -1).double()
        different = float((1 - (1 - q) ** 50).sum(-1).mean())
        low, high = (scale, high) if different > 12 else (low, scale)


def stepper(folder: Path, name: str, *settings: str) -> Callable[[], float]:
    """Takes a step of a new run; gives its seconds, reading included."""
    config = load_config([], [f"run_dir={folder / name}", *settings])
    (folder / name).mkdir()
    run, state = build_run(config, start(), folder / name), TrainState()
    window = Window(run, state)
    batches = train_batches(run.samples, 0, config.batch_size, run.micro, 0, 1)
    objective = Objective(config.objective, run.vocab_size, 0.0)
    run.follow_schedule(0)

    def step() -> float:
        began = time.perf_counter()
        train_step(run, batches, objective, 1e-3, state, window)
        state.step, state.consumed = state.step + 1, state.consumed + config.batch_size
        return time.perf_counter() - began

    return step


def different(folder: Path) -> float:
    """Classes that a row of drawn targets keeps, on average."""
    reader = TargetReader(folder)
    _, members = reader._shard(reader.header.range_of(0))
    at = np.arange(min(8, len(members)))
    keys = [members[i].name.split(".")[0].split("_") for i in at]
    epochs, ids = (np.array([int(key[i]) for key in keys]) for i in range(2))
    found = reader.read(at, epochs, ids, [reader.header.samples["sequence_length"] - 1] * len(at))
    return float((found.probs_NK > 0).sum(1).float().mean())  # type: ignore[union-attr]


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    shared = make(folder, arguments)
    found: dict[str, Any] = {"vocab": arguments.vocab, "length": arguments.length, "batch": arguments.batch}
    live = f"teacher.trajectory={folder / 'teacher'}"
    for name, options in CODECS.items():
        say(f"scoring {name}")
        ended = tiny.distill(["score", *shared, live, *options, "--out", str(folder / name)], folder).ok()
        told = json.loads(ended.output.splitlines()[-1])
        found |= {
            f"{name}_bytes": told["bytes_a_token"],
            f"{name}_stored_bytes": told["stored_bytes_a_token"],
        }
    found["sampled_different"] = round(different(folder / "sampled"), 1)
    steps = {"hard": stepper(folder, "run_hard", *shared), "live": stepper(folder, "run_live", *shared, live)}
    for name in CODECS:
        steps[name] = stepper(folder, f"run_{name}", *shared, f"teacher.targets={folder / name}")
    rounds = [{name: step() for name, step in steps.items()} for _ in range(arguments.steps)][WARM_UP:]
    found["hard_step_seconds"] = round(statistics.median(each["hard"] for each in rounds), 4)
    for name in steps:
        ratios = [each[name] / each["hard"] for each in rounds]
        found[f"{name}_ratio"] = round(statistics.median(ratios), 3)
    del found["hard_ratio"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--csv", type=Path, default=CSV, help="where a row is appended")
    arguments = parser.parse_args()
    row = provenance("cpu")  # the load is that before the bench makes its own
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), arguments)
    append_row(arguments.csv, {**row, "cores": os.cpu_count(), **found})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
