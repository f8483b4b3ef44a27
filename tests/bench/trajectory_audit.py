"""Audit of a 154-step trajectory of a 70M model over a real S3 server on loopback: share of its bytes, and seconds.

The model has the sizes of Pythia-70M, in fp16. Its steps are a random walk of the weights from a real initialisation:
training 154 real checkpoints of that size would take days, and an audit reads the same of either. One step serves the
final weights, and one shares nothing with its neighbours, so that the row also tells that both were found.

    python tests/bench/trajectory_audit.py [--json] [--steps 154]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from storage import BUCKET, Seaweed  # noqa: E402

from distill.trajectory.audit.report import audit  # noqa: E402
from distill.trajectory.index import index_trajectory  # noqa: E402
from distill.trajectory.store import Store, open_store  # noqa: E402

PYTHIA_70M = {
    "vocab_size": 50304,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "tie_word_embeddings": False,
}
WRONG, LOST = 10, 20  # positions of a step with the final weights, and of one off the path


def steps_of_pythia(count: int) -> list[int]:
    """0, powers of two up to 512, then every thousand: 154 as published."""
    return [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)][:count]


def upload_trajectory(store: Store, steps: list[int]) -> int:
    """Upload a walk of weights under the names of Pythia. Returns its bytes."""
    config = AutoConfig.for_model("gpt_neox", **PYTHIA_70M)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    content = bytearray(save(model.state_dict(), {"format": "pt"}))
    header = 8 + int.from_bytes(content[:8], "little")
    weights = torch.frombuffer(content, dtype=torch.float16, offset=header)
    stride = torch.randn(len(weights)).mul_(1e-3).half()
    for position, step in enumerate(steps):
        shift = 1 + 7919 * position
        weights[shift:] += stride[:-shift]
        if position == LOST:
            path = weights.clone()
            weights.copy_(path.flip(0))
        store.write(f"step{step}/model.safetensors", content)
        store.write(f"step{step}/config.json", json.dumps(config.to_dict()).encode())
        if position == LOST:
            weights.copy_(path)
    store.write(f"step{steps[WRONG]}/model.safetensors", content)
    return len(content) * len(steps)


def measure(num_steps: int = 154) -> dict[str, Any]:
    """Upload, index and audit; the server runs for that long."""
    steps = steps_of_pythia(num_steps)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        server = Seaweed(Path(folder) / "seaweed")
        server.start()
        try:
            os.environ.update(server.environ)
            url = f"s3://{BUCKET}/pythia-70m"
            total = upload_trajectory(open_store(url), steps)
            start = time.perf_counter()
            manifest = index_trajectory(url)
            index_seconds, index_bytes = time.perf_counter() - start, manifest.store.bytes_read
            found = audit(manifest)
        finally:
            server.close()
    return {
        "steps": len(steps),
        "trajectory_bytes": total,
        "index_seconds": round(index_seconds, 2),
        "index_share": index_bytes / total,
        "audit_seconds": found.seconds,
        "audit_bytes": found.bytes_read,
        "audit_share": found.bytes_read / total,
        "found": sorted(found.bad) == sorted([steps[WRONG], steps[LOST]]),
        "bad_steps": {step: verdict.reason for step, verdict in found.bad.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=154, help="checkpoints of 141 MB each")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    row = measure(arguments.steps)
    if arguments.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
