"""Tokenise-and-pack (documents to shards) next to bare SentencePiece and Hugging Face `datasets`, in one run.

    python tests/bench/bench_tokenize_pack.py DOCUMENTS TOKENIZER [--processes 1 2] [--grow 4] [--repeats 3]

MB are 10^6 bytes of UTF-8 text. Every figure is the best of interleaved repeats, so that a busy machine strikes
all alike; `cpu` ratios compare processor time, which other programs disturb less.
`pack` is the whole stage: unpacking, JSON, ids, tar files, hashes, fsync, and the start of its processes.
`bare` only encodes texts that are already in memory, with the model's own `encode`, in as many processes.
`datasets` is what is usually done: `map` with the fast tokenizer, then `map` to equal lengths, from memory to Arrow
files (measured where `datasets` is installed). --grow repeats the text, to see the rate without the start.
Rows are appended to bench_tokenize_pack.csv.
"""

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece as spm

from data_prep import blocks, pack
from data_prep.files import write_json
from data_prep.parts import load_index, part_paths, read_part
from data_prep.tokenizer_files import UNIGRAM, parse_model

CSV = Path(__file__).with_suffix(".csv")
LENGTH = 128
_texts: list[str] = []
_processor: Any = None


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of this process and of the ones it has ended


def now() -> Seconds:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Seconds(time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages))


def since(start: Seconds) -> Seconds:
    end = now()
    return Seconds(end.wall - start.wall, end.cpu - start.cpu)


def grow(documents: Path, times: int, out: Path) -> Path:
    """The same documents several times over, by links."""
    index = load_index(documents)
    out.mkdir()
    parts = []
    for split in pack.SPLITS:
        named = [part for part in index["parts"] if part["name"].startswith(f"{split}-")]
        for number, part in enumerate(named * times):
            name = f"{split}-{number:05d}.jsonl.zst"
            (out / name).symlink_to((documents / part["name"]).resolve())
            parts.append({**part, "name": name})
    write_json(out / "index.json", {**index, "parts": parts})
    return out


def pack_seconds(documents: Path, tokenizer: Path, processes: int) -> Seconds:
    with tempfile.TemporaryDirectory() as out:
        parser = argparse.ArgumentParser()
        pack.add_arguments(parser)
        args = [str(documents), "--tokenizer", str(tokenizer), "--out", out, "--workers", str(processes)]
        blocks._tokenizer.cache_clear()  # remembered words are part of the cost
        start = now()
        pack.run(parser.parse_args(args))
        return since(start)


class BareSentencePiece:
    """Processes that hold a share of the texts each and encode it when told."""

    def __init__(self, documents: Path, tokenizer: Path, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pools = [context.Pool(1) for _ in range(processes)]
        paths = part_paths(documents)
        jobs = [
            pool.apply_async(_hold, (paths, str(tokenizer / "tokenizer.model"), n, processes))
            for n, pool in enumerate(self.pools)
        ]
        self.num_bytes = sum(job.get() for job in jobs)

    def seconds(self) -> Seconds:
        start = time.perf_counter()
        jobs = [pool.apply_async(_encode_held) for pool in self.pools]
        cpu = sum(job.get() for job in jobs)
        return Seconds(time.perf_counter() - start, cpu)

    def close(self) -> None:
        for pool in self.pools:
            pool.terminate()


def _hold(paths: Sequence[Path], model: str, number: int, processes: int) -> int:
    """Keep the texts of this process: each goes where least has gone so far. Returns their bytes."""
    global _processor
    _processor = spm.SentencePieceProcessor(model_file=model)
    held = [0] * processes
    for path in paths:
        for document in read_part(path):
            share = int(np.argmin(held))
            size = len(document["text"].encode())
            held[share] += size
            if share == number:
                _texts.append(document["text"])
    return held[number]


def _encode_held() -> float:
    start = time.process_time()
    for text in _texts:
        _processor.encode(text)
    return time.process_time() - start


def datasets_seconds(documents: Path, tokenizer: Path, processes: int) -> Seconds:
    """`map` twice, as in the usual language-model scripts."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    auto = AutoTokenizer.from_pretrained(tokenizer)
    texts = [document["text"] for path in part_paths(documents) for document in read_part(path)]

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = auto(rows["text"], add_special_tokens=False, return_attention_mask=False).input_ids
        return {"input_ids": [[2, *row, 3] for row in ids]}

    def cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(chain.from_iterable(rows["input_ids"]))
        return {
            "input_ids": [joined[i : i + LENGTH] for i in range(0, len(joined) // LENGTH * LENGTH, LENGTH)]
        }

    with tempfile.TemporaryDirectory() as cache:
        data = datasets.Dataset.from_dict({"text": texts})
        data.save_to_disk(f"{cache}/text")
        data = datasets.load_from_disk(f"{cache}/text")
        options: dict[str, Any] = {"batched": True, "num_proc": processes if processes > 1 else None}
        start = now()
        data = data.map(encode, remove_columns=["text"], cache_file_name=f"{cache}/ids.arrow", **options)
        data.map(cut, cache_file_name=f"{cache}/cut.arrow", **options)
        return since(start)


def machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "device": f"{model} x{os.cpu_count()} threads",
        "load": f"{os.getloadavg()[0]:.1f}",
        "sentencepiece": spm.__version__,
        "python": platform.python_version(),
    }


def measure(documents: Path, tokenizer: Path, processes: int, repeats: int) -> dict[str, str]:
    bare = BareSentencePiece(documents, tokenizer, processes)
    steps: dict[str, Callable[[], Seconds]] = {
        "pack": lambda: pack_seconds(documents, tokenizer, processes),
        "bare": bare.seconds,
    }
    if find_spec("datasets"):
        steps["datasets"] = lambda: datasets_seconds(documents, tokenizer, processes)
    times = [{name: step() for name, step in steps.items()} for _ in range(repeats)]
    bare.close()
    best = {name: Seconds(*map(min, zip(*(row[name] for row in times), strict=True))) for name in steps}
    row = {"processes": str(processes), "text_mb": f"{bare.num_bytes / 1e6:.1f}"}
    for name in ("pack", "bare", "datasets"):
        row[f"{name}_mb_s"] = f"{bare.num_bytes / 1e6 / best[name].wall:.2f}" if name in best else ""
    for name in ("bare", "datasets"):
        for kind in Seconds._fields:
            ratio = getattr(best[name], kind) / getattr(best["pack"], kind) if name in best else None
            row[f"pack_over_{name}_{kind}"] = f"{ratio:.2f}" if ratio else ""
    return row


def append(row: dict[str, str]) -> None:
    is_new = not CSV.exists()
    with open(CSV, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("documents", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--grow", type=int, default=1, help="repeat the text so many times")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    spec = parse_model((args.tokenizer / "tokenizer.model").read_bytes()).trainer_spec
    kind = "unigram" if spec.model_type == UNIGRAM else "bpe"
    with tempfile.TemporaryDirectory() as folder:
        documents = grow(args.documents, args.grow, Path(folder) / "documents")
        for processes in args.processes:
            row = machine() | {"model": kind} | measure(documents, args.tokenizer, processes, args.repeats)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            append(row)


if __name__ == "__main__":
    main()
