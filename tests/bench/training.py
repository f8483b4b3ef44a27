"""What the loop costs around the arithmetic: its step, a second rank, saving, resuming. On CPU.

    python tests/bench/training.py [--json] [--steps 20] [--repeats 6]

A BERT of 3.3 M parameters learns from a teacher of the same size, 128 sequences of 32 tokens a step, in fp32; where there is a
GPU, `loop` and `save` are of a BERT-base, 2048 sequences a step, in bf16, and the rest is left out.
`loop`: a step of the loop (data, teacher, DeepSpeed, accounting, a row of metrics) next to the same forwards, backward, clipping
and AdamW in plain torch on a batch in memory, alternating in one run; medians. `ranks`: tokens a second of two ranks, each on a
core of its own, over one rank on one core; `pair`: the sum of two runs at once that share nothing but the machine; whole runs,
interleaved, best of the repeats. `save`: seconds that a resumable checkpoint blocks the
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from measure import append_row, provenance  # noqa: E402

import distill.train as loop  # noqa: E402
from distill.build import Run, student_model  # noqa: E402
from distill.config import SaveConfig  # noqa: E402
from distill.data import Batch  # noqa: E402
from distill.engine import Student  # noqa: E402
from distill.models import build_model  # noqa: E402
from distill.trajectory.manifest import Manifest, describe  # noqa: E402
from distill.trajectory.store import open_store  # noqa: E402

CSV = Path(__file__).with_suffix(".csv")
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SHAPE |= {"max_position_embeddings": tiny.LENGTH}
BATCH = 128
ON_GPU = torch.cuda.is_available()
if ON_GPU:
    SHAPE |= {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    BATCH = 2048


def make_teacher(folder: Path) -> Path:
    manifest = Manifest(open_store(folder), "distill", "bert", tiny.VOCABULARY)
    sizes = {"vocab_size": tiny.VOCABULARY, "sequence_length": tiny.LENGTH, "special_ids": {}, "seed": 1}
    build_model("mlm", "bert", SHAPE, **sizes).save_pretrained(folder / "step_1")  # type: ignore[arg-type]
    manifest.add(describe(folder / "step_1", "step_1", 1))
    manifest.complete = True
    manifest.write()
    return folder


def clock() -> float:
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def keys_of(teacher: Path, **changes: Any) -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        **({"engine__dtype": "bf16", "teacher__dtype": "bf16"} if ON_GPU else {}),
        "model__overrides": SHAPE,
        "teacher__trajectory": str(teacher),
        "log__eval_every": 10**6,
        "log__eval_samples": 1,
        "log__every": 10,
        "save__every": 10**6,
        **changes,
    }


# ------------------------------------------------------------------------------------------------ in one process


class Plain:
    """A step in plain torch: forwards, backward, clipping, AdamW; with fp32 masters of weights that are not fp32."""

    def __init__(self, run: Run) -> None:
        model = student_model(run.config, run.samples).to(run.engine.model.device, run.engine.model.dtype)
        self.student, self.clip = Student(model).train(), run.config.optim.clip
        self.weights = list(self.student.parameters())
        self.masters = [w.detach().float() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, fused=True)

    def __call__(self, run: Run, batch: Batch, objective: Any, lr: float) -> None:
        assert run.teacher is not None
        said = run.teacher.signal(batch)
        sums = self.student(batch.inputs, batch.rows_N, batch.labels_N, said, objective)
        (sums.loss / len(batch.rows_N)).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                if master.dtype != weight.dtype:  # else they are one
                    weight.copy_(master)


class Alternating:
    """In the place of `train_step`: after each step of the loop, the same work alone."""

    def __init__(self) -> None:
        self.loop_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self._step, self._left = loop.train_step, 0.0
        self._plain: Plain | None = None

    def __call__(self, run: Run, batches: Any, objective: Any, lr: float, state: Any, window: Any) -> Any:
        norm = self._step(run, batches, objective, lr, state, window)
        now = clock()
        if self._left:
            self.loop_seconds.append(now - self._left)
        if self._plain is None:
            self._plain, self._batch = Plain(run), run.samples[np.arange(BATCH)].to(run.world.device)
        before = clock()
        self._plain(run, self._batch, objective, lr)
        self._left = clock()
        self.bare_seconds.append(self._left - before)
        return norm


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
        keys = keys_of(teacher, steps=steps, save__every=steps // 5, log__every=1)
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
def started(arguments: list[str], ranks: int = 1, core: int = 0) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`distill ARGUMENTS` on that many ranks, each on a core of its own. What still runs is killed in the end."""
    environ = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    of_rank = tiny.rank_environs(ranks) if ranks > 1 else [{}]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            command = ["taskset", "-c", str(core + rank), sys.executable, "-m", "distill", *arguments]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(subprocess.Popen(command, env=environ | of_rank[rank], **silent))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def speed_of(run_dir: Path) -> float:
    rows = tiny.read_rows(run_dir / "metrics.jsonl", "train")[1:]  # the first builds the teacher
    return statistics.median(row["tokens_per_second"] for row in rows)


def tokens_per_second(shards: Path, teacher: Path, run_dir: Path, ranks: int, steps: int) -> float:
    arguments = ["train", *tiny.settings(shards, run_dir, **keys_of(teacher, steps=steps))]
    with started(arguments, ranks) as processes:
        assert [p.wait() for p in processes] == [0] * ranks
    return speed_of(run_dir)


def tokens_per_second_of_a_pair(shards: Path, teacher: Path, folder: Path, steps: int) -> float:
    """Of two runs at once that share nothing but the machine."""
    keys = keys_of(teacher, steps=steps)
    runs = [folder.with_name(f"{folder.name}-{core}") for core in range(2)]
    with ExitStack() as stack:
        for core, run_dir in enumerate(runs):
            command = ["train", *tiny.settings(shards, run_dir, **keys)]
            (process,) = stack.enter_context(started(command, core=core))
            stack.callback(process.wait)
    return sum(map(speed_of, runs))


def measure_ranks(shards: Path, teacher: Path, folder: Path, steps: int, repeats: int) -> dict[str, float]:
    found: dict[str, list[float]] = {"1": [], "2": [], "pair": []}
    for repeat in range(repeats):
        for ranks in (1, 2):
            run_dir = folder / f"r{ranks}-{repeat}"
            found[str(ranks)].append(tokens_per_second(shards, teacher, run_dir, ranks, steps))
        found["pair"].append(tokens_per_second_of_a_pair(shards, teacher, folder / f"p{repeat}", steps))
    one, two, pair = (max(speeds) for speeds in found.values())
    return {
        "ranks_1_tokens_per_second": one,
        "ranks_2_tokens_per_second": two,
        "ranks_2_over_1": two / one,
        "pair_over_1": pair / one,
        "ranks_2_over_pair": two / pair,
    }


def seconds_to_first_step(arguments: list[str], run_dir: Path) -> float:
    """Until the first row of metrics is there that was not before; a resumed run drops those after its checkpoint."""
    metrics, saved = run_dir / "metrics.jsonl", sorted(run_dir.glob("checkpoints/step_????????"))
    wanted = int(saved[-1].name[5:]) + 1 if saved else 1
    if saved:
        lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] < wanted]
        metrics.write_text("".join(f"{line}\n" for line in lines))
    start = time.perf_counter()
    with started(arguments) as (process,):
        while not metrics.exists() or all(row["step"] < wanted for row in tiny.read_rows(metrics, "train")):
            assert process.poll() is None, "it ended before its first step"
            time.sleep(0.005)
        return time.perf_counter() - start


def measure_start(shards: Path, teacher: Path, folder: Path, repeats: int) -> dict[str, float]:
    def command(run_dir: Path, **changes: Any) -> list[str]:
        keys = keys_of(teacher, steps=10**6, log__every=1, save__every=3, optim__decay="constant")
        return ["train", *tiny.settings(shards, run_dir, **{**keys, **changes})]

    saved = folder / "saved"
    with started(command(saved)):
        while not list((saved / "checkpoints").glob("step_????????/state.json")):
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
    if not ON_GPU:
        yield from measure_ranks(shards, teacher, folder, steps, repeats).items()
        yield from measure_start(shards, teacher, folder, repeats).items()
    yield from measure_loop(shards, teacher, folder, steps).items()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--csv", type=Path, default=CSV, help="where a row is appended")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs that are under way
    row = provenance("cuda" if ON_GPU else "cpu")  # the load is that before the bench makes its own
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        found = {key: round(v, 4) for key, v in measure(Path(name), arguments.steps, arguments.repeats)}
    append_row(arguments.csv, row | {"cores": str(os.cpu_count())} | found)
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
