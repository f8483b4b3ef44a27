"""What the loop costs around the arithmetic: its step, a second rank, saving, resuming. On CPU.

    python tests/bench/training.py [--json] [--steps 60] [--repeats 3]

A BERT of 3.3 M parameters learns from a teacher of the same size, 32 sequences of 32 tokens a step, in fp32.
`loop`: a step of the loop (data, teacher, accounting, rows, agreement) next to the same forwards, backward and optimizer
on a batch in memory, alternating in one run; medians. `ranks`: tokens a second of two ranks, each on a core of its own,
over one rank on one core; whole runs, interleaved, best of the repeats. `save`: seconds that a resumable checkpoint blocks the
loop, as a share of the 500 steps of the default interval; median. `start`: from the command to the end of the first step, of
a fresh run and of one that goes on (`same`: as it was saved; `other`: dealt anew to another ZeRO stage); interleaved, best.
A row is appended to training.csv. Other work on the machine spoils all but `loop`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import numpy as np  # noqa: E402
import tiny  # noqa: E402
from measure import append_row, provenance  # noqa: E402

import distill.train as loop  # noqa: E402
from distill.build import Run  # noqa: E402
from distill.config import SaveConfig  # noqa: E402
from distill.models import build_model  # noqa: E402
from distill.trajectory.manifest import Manifest, describe  # noqa: E402
from distill.trajectory.store import open_store  # noqa: E402

CSV = Path(__file__).with_suffix(".csv")
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SHAPE |= {"max_position_embeddings": tiny.LENGTH}
BATCH = 32


def make_teacher(folder: Path) -> Path:
    manifest = Manifest(open_store(folder), "distill", "bert", tiny.VOCABULARY)
    sizes = {"vocab_size": tiny.VOCABULARY, "sequence_length": tiny.LENGTH, "special_ids": {}, "seed": 1}
    build_model("mlm", "bert", SHAPE, **sizes).save_pretrained(folder / "step_1")  # type: ignore[arg-type]
    manifest.add(describe(folder / "step_1", "step_1", 1))
    manifest.complete = True
    manifest.write()
    return folder


def keys_of(teacher: Path, **changes: Any) -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        "model__overrides": SHAPE,
        "teacher__trajectory": str(teacher),
        "log__eval_every": 10**6,
        "log__eval_samples": 1,
        "log__every": 10,
        "save__every": 10**6,
        **changes,
    }


# ------------------------------------------------------------------------------------------------ in one process


class Alternating:
    """In the place of `train_step`: after each step of the loop, the same work alone."""

    def __init__(self) -> None:
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._step, self._batch, self._left = loop.train_step, None, 0.0

    def __call__(self, run: Run, batches: Any, objective: Any, lr: float, state: Any, window: Any) -> Any:
        norm = self._step(run, batches, objective, lr, state, window)
        now = time.perf_counter()
        if self._left:
            self.loop_seconds.append(now - self._left)
        self._bare(run, objective, lr)
        self.bare_seconds.append(time.perf_counter() - now)
        self._left = time.perf_counter()
        return norm

    def _bare(self, run: Run, objective: Any, lr: float) -> None:
        self._batch = batch = self._batch or run.samples[np.arange(BATCH)]
        assert run.teacher is not None
        teacher_rows = run.teacher.rows(batch.inputs, batch.rows_N)
        sums = run.engine.forward(batch.inputs, batch.rows_N, batch.labels_N, teacher_rows, objective)
        run.engine.backward(sums.loss, float(len(batch.rows_N)))
        run.engine.step(lr)


def measure_loop(shards: Path, teacher: Path, folder: Path, steps: int) -> dict[str, float]:
    """The loop's step over the bare one, and what saving takes."""
    alternating, saves, save = Alternating(), [], loop.checkpoint.save

    def timed_save(*arguments: Any) -> None:
        start = time.perf_counter()
        save(*arguments)
        saves.append(time.perf_counter() - start)

    plain = loop.train_step
    loop.train_step, loop.checkpoint.save = alternating, timed_save  # type: ignore[assignment]
    try:
        keys = keys_of(teacher, steps=steps, save__every=steps // 5)
        loop.train(tiny.config(shards, folder / "loop", **keys))
    finally:
        loop.train_step, loop.checkpoint.save = plain, save  # type: ignore[assignment]
    # A save falls between two steps of the loop, and is counted by itself.
    step, bare = (statistics.median(s[3:]) for s in (alternating.loop_seconds, alternating.bare_seconds))
    blocked, between = statistics.median(saves), SaveConfig().every * step
    return {
        "loop_step_ms": 1e3 * step,
        "loop_bare_ms": 1e3 * bare,
        "loop_bare_over_step": bare / step,
        "save_seconds": blocked,
        "save_share": blocked / (between + blocked),
    }


# ------------------------------------------------------------------------------------------------ whole runs


@contextmanager
def started(arguments: list[str], ranks: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`distill ARGUMENTS` on that many ranks, each on a core of its own. What still runs is killed in the end."""
    environ = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if ranks > 1:
        environ |= {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(tiny.free_port()),
        }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            command = ["taskset", "-c", str(rank), sys.executable, "-m", "distill", *arguments]
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, env=environ | of_rank, **silent))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tokens_per_second(shards: Path, teacher: Path, run_dir: Path, ranks: int, steps: int) -> float:
    arguments = ["train", *tiny.settings(shards, run_dir, **keys_of(teacher, steps=steps))]
    with started(arguments, ranks) as processes:
        assert [p.wait() for p in processes] == [0] * ranks
    rows = tiny.read_rows(run_dir / "metrics.jsonl", "train")[1:]  # the first builds the teacher
    return statistics.median(row["tokens_per_second"] for row in rows)


def measure_ranks(shards: Path, teacher: Path, folder: Path, steps: int, repeats: int) -> dict[str, float]:
    found: dict[int, list[float]] = {1: [], 2: []}
    for repeat in range(repeats):
        for ranks, speeds in found.items():
            speeds.append(tokens_per_second(shards, teacher, folder / f"r{ranks}-{repeat}", ranks, steps))
    one, two = max(found[1]), max(found[2])
    return {"ranks_1_tokens_per_second": one, "ranks_2_tokens_per_second": two, "ranks_2_over_1": two / one}


def seconds_to_first_step(arguments: list[str], run_dir: Path) -> float:
    metrics = run_dir / "metrics.jsonl"
    before = len(tiny.read_rows(metrics, "train")) if metrics.exists() else 0
    start = time.perf_counter()
    with started(arguments) as (process,):
        while not metrics.exists() or len(tiny.read_rows(metrics, "train")) <= before:
            assert process.poll() is None, "it ended before its first step"
            time.sleep(0.005)
        return time.perf_counter() - start


def measure_start(shards: Path, teacher: Path, folder: Path, repeats: int) -> dict[str, float]:
    def command(run_dir: Path, **changes: Any) -> list[str]:
        keys = keys_of(teacher, steps=10**6, log__every=1, save__every=3, optim__decay="constant")
        return ["train", *tiny.settings(shards, run_dir, **{**keys, **changes})]

    saved = folder / "saved"
    with started(command(saved)):
        while not list((saved / "checkpoints").glob("step_*/state.json")):
            time.sleep(0.05)
    found: dict[str, list[float]] = {"fresh": [], "same": [], "other": []}
    for repeat in range(repeats):
        for kind, seconds in found.items():
            run_dir = folder / f"{kind}-{repeat}"
            if kind != "fresh":
                shutil.copytree(saved, run_dir)
            arguments = command(run_dir, engine__zero_stage=2 if kind == "other" else 1)
            seconds.append(seconds_to_first_step(arguments, run_dir))
    best = {f"start_{kind}_seconds": min(seconds) for kind, seconds in found.items()}
    return best | {f"start_{k}_over_fresh": min(found[k]) / min(found["fresh"]) for k in ("same", "other")}


def measure(folder: Path, steps: int, repeats: int) -> Iterator[tuple[str, float]]:
    shards, teacher = tiny.write_text_shards(folder / "shards"), make_teacher(folder / "teacher")
    yield from measure_ranks(shards, teacher, folder, steps, repeats).items()
    yield from measure_start(shards, teacher, folder, repeats).items()
    yield from measure_loop(shards, teacher, folder, steps).items()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV, help="where a row is appended")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs that are under way
    row = provenance("cpu")  # the load is that before the bench makes its own
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        found = {key: round(v, 4) for key, v in measure(Path(name), arguments.steps, arguments.repeats)}
    append_row(arguments.csv, row | {"cores": str(os.cpu_count())} | found)
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
