"""Streaming a teacher: fetch next to the fastest client, the cost of a swap, stall of a run, bytes for four nodes.

    python tests/bench/trajectory.py [--json] [--mb 1024] [--repeats 3] [--audit-steps 154]

A real S3 server on loopback shares the machine with its client. `fetch`: files of a checkpoint (4 shards of bf16
tensors) to torch tensors over the node's cache, next to 8 MiB `get_range_async` straight into tensors that are
allocated already, interleaved, best of the repeats. `verified` has SHA-256 of every byte in it, which the client does
not compute; `hashed` is the client followed by just that. `staged` has the copy into the teacher's own memory too.
`swap`: a student of a prefetched trajectory of nine stages. `nodes`: bytes that leave storage when four ranks, each
with a disk of its own, start from one checkpoint. `audit`: see trajectory_audit.py; --audit-steps 0 leaves it out.
A row with all of it is appended to trajectory.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import tiny  # noqa: E402
import trajectory_audit  # noqa: E402
from measure import append_row, provenance  # noqa: E402
from storage import BUCKET, Seaweed  # noqa: E402
from trajectory_fetch import measure_fetch  # noqa: E402

from distill.trajectory.manifest import Manifest, describe  # noqa: E402
from distill.trajectory.publish import publish  # noqa: E402
from distill.trajectory.store import open_store  # noqa: E402

CSV = Path(__file__).with_suffix(".csv")


def make_teacher(folder: Path, server: Seaweed) -> tuple[Path, str, dict[str, Any]]:
    """(shards, URL of a trajectory of nine random checkpoints, shape of its model)."""
    shards = tiny.write_text_shards(folder / "shards")
    shape = {"n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": tiny.LENGTH}
    from distill.models import build_model

    manifest = Manifest(open_store(folder / "teacher"), "distill", "gpt2", tiny.VOCABULARY)
    for step in range(1, 10):
        sizes = {
            "vocab_size": tiny.VOCABULARY,
            "sequence_length": tiny.LENGTH,
            "special_ids": {},
            "seed": step,
        }
        target = folder / "teacher" / f"step_{step}"
        build_model("clm", "gpt2", shape, **sizes).save_pretrained(target)  # type: ignore[arg-type]
        manifest.add(describe(target, target.name, step))
    manifest.complete = True
    manifest.write()
    return shards, publish(folder / "teacher", f"s3://{BUCKET}/nine").url, shape


def student(shards: Path, run_dir: Path, url: str, shape: dict[str, Any], **keys: Any) -> list[str]:
    fixed = {"data__task": "clm", "model__architecture": "gpt2", "model__overrides": shape, "log__every": 1}
    rest = {
        "teacher__trajectory": url,
        "teacher__cache": "$DISK",
        "save__every": 10**6,
        "log__eval_every": 10**6,
    }
    return ["train", *tiny.settings(shards, run_dir, **fixed, **rest, **keys)]


def measure_swaps(server: Seaweed, folder: Path, steps_a_stage: int = 6) -> dict[str, Any]:
    shards, url, shape = make_teacher(folder, server)
    keys = {"schedule__kind": "equal", "steps": 9 * steps_a_stage, "batch_size": 64}
    environ = {**server.environ, "DISK": str(folder / "disk")}
    tiny.Started(student(shards, folder / "run", url, shape, **keys), folder / "out", environ).wait(1800).ok()
    rows = tiny.read_rows(folder / "run" / "metrics.jsonl", "train")[1:]  # the first builds the model
    boundaries = rows[steps_a_stage - 1 :: steps_a_stage]
    seconds, stalls = (
        sorted(r["seconds"] - r["stall_seconds"] for r in rows),
        [r["stall_seconds"] for r in boundaries],
    )
    step = seconds[len(seconds) // 2]
    return {
        "swaps": len(boundaries),
        "step_seconds": round(step, 3),
        "swap_seconds": round(sorted(stalls)[len(stalls) // 2], 4),
        "swap_share_of_a_step": round(sorted(stalls)[len(stalls) // 2] / step, 4),
        "worst_share_of_a_step": round(max(stalls) / step, 4),
        "stall_share_of_the_run": round(
            sum(r["stall_seconds"] for r in rows) / sum(r["seconds"] for r in rows), 5
        ),
        "nodes": measure_nodes(server, folder, student(shards, folder / "four", url, shape, steps=1)),
    }


def measure_nodes(server: Seaweed, folder: Path, arguments: list[str]) -> dict[str, Any]:
    ranks = [
        {**server.environ, **own, "DISK": str(folder / f"disk{r}")}
        for r, own in enumerate(tiny.rank_environs(4))
    ]
    started = [tiny.Started(arguments, folder / f"four{r}", environ) for r, environ in enumerate(ranks)]
    said = [s.wait(1800).ok().output for s in started]
    found = [re.search(r"step 9: ([\d.]+) MB fetched in .* s, ([\d.]+) MB of it", text) for text in said]
    whole, own = float(found[0][1]), [float(f[2]) for f in found if f]  # type: ignore[index]
    return {"checkpoint_mb": whole, "from_storage_mb": own, "share": round(sum(own) / whole, 4)}


def flat(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns: `fetch_seconds` for a figure of a part, JSON for a list; the nodes are a part of their own."""
    for part, figures in found.items():
        if not isinstance(figures, dict):
            yield part, figures
            continue
        for name, value in figures.items():
            if name == "nodes":
                yield from flat({name: value})
            else:
                yield f"{part}_{name}", json.dumps(value) if isinstance(value, list | dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--mb", type=int, default=1024, help="size of the checkpoint that is fetched")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--audit-steps", type=int, default=154)
    parser.add_argument("--csv", type=Path, default=CSV, help="where a row is appended")
    arguments = parser.parse_args()
    row = provenance("cpu")  # the load is that before the bench makes its own
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        server = Seaweed(Path(name) / "seaweed")
        server.start()
        try:
            os.environ.update(server.environ)
            found: dict[str, Any] = {"load": float(row["load"]), "cores": os.cpu_count()}
            found["fetch"] = measure_fetch(server, Path(name), arguments.mb, arguments.repeats)
            found["swap"] = measure_swaps(server, Path(name))
        finally:
            server.close()
    if arguments.audit_steps:
        found["audit"] = trajectory_audit.measure(arguments.audit_steps)
    append_row(arguments.csv, row | dict(flat(found)))
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
