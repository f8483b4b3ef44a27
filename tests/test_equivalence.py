"""The loss is divided once by the global number of counted tokens: ranks, micro-batches and ZeRO change nothing.

Two layouts add the same numbers in another order, so they agree to fp32 rounding, about 1e-6 of a sum, grown by
the steps taken. A loss that averaged micro-batches or ranks would be off by percents on this data. AdamW runs with
eps 1e-3 here: with 1e-8 it divides gradients that are zero but for rounding (key biases) by their own size, and
walks off with a full learning rate in a direction that rounding chose.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, config, distill, distill_on_ranks, ragged_text, rows, settings, write_text_shards

from distill.data import Samples, train_batches

LAYOUTS = {
    "1 rank x 8": (1, 0, 1),
    "1 rank x 4 x 2 accumulated": (1, 4, 1),
    "1 rank x 1 x 8 accumulated": (1, 1, 1),
    "2 ranks x 4": (2, 0, 1),
    "2 ranks x 2 x 2 accumulated": (2, 2, 1),
    "ZeRO 0": (1, 0, 0),
    "ZeRO 0, accumulated": (1, 2, 0),
    "ZeRO 2, accumulated": (1, 2, 2),
    "ZeRO 0, 2 ranks, accumulated": (2, 2, 0),
    "ZeRO 2, 2 ranks, accumulated": (2, 2, 2),
}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_shards(tmp_path_factory.mktemp("ragged") / "shards", make=ragged_text)


def run(
    folder: Path, shards: Path, teacher_run: Path, ranks: int, micro: int, stage: int, **more: Any
) -> Path:
    changes: dict[str, Any] = {
        "teacher__trajectory": str(teacher_run / "trajectory"),
        "schedule__kind": "equal",
        "schedule__num_stages": 2,
        "objective__weights": {"forward_kl": 1.0, "hard": 0.5},
        "optim__eps": 1e-3,
        "optim__clip": 0.05,
        "log__every": 1,
    }
    changes |= {"micro_batch_size": micro, "engine__zero_stage": stage, **more}
    arguments = ["train", *settings(shards, folder / "run", **changes)]
    ended = [distill(arguments, folder)] if ranks == 1 else distill_on_ranks(arguments, folder, ranks)
    for one in ended:
        one.ok()
    return folder / "run"


@pytest.fixture(scope="module")
def reference(ragged: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("reference"), ragged, teacher_run, *LAYOUTS["1 rank x 8"])


def parameters(run_dir: Path) -> torch.Tensor:
    weights = load_file(run_dir / "model" / "model.safetensors")
    return torch.cat([weights[name].float().flatten() for name in sorted(weights)])


def assert_close_rows(run_dir: Path, reference: Path) -> None:
    for found, expected in zip(rows(run_dir), rows(reference), strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_the_data_is_unequal_enough_to_tell_a_wrong_normalisation(ragged: Path, tmp_path: Path) -> None:
    samples = Samples(config(ragged, tmp_path).data, "train", seed=0, shuffle=True)
    counts = [
        len(next(train_batches(samples, 8 * step, 8, 4, rank, 2)).rows_N)
        for step in range(12)
        for rank in (0, 1)
    ]
    halves = np.array(counts).reshape(12, 2)
    assert (halves.max(1) > 1.2 * halves.min(1)).sum() >= 6


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1 rank x 8"])
def test_layout_changes_neither_losses_nor_weights(
    layout: str, reference: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    other = run(tmp_path, ragged, teacher_run, *LAYOUTS[layout])
    assert_close_rows(other, reference)
    torch.testing.assert_close(parameters(other), parameters(reference), rtol=0, atol=2e-6)


def test_gradient_norm_is_the_one_before_clipping_in_every_stage(reference: Path) -> None:
    norms = [row["grad_norm"] for row in rows(reference, "train")]
    assert min(norms) > 0.05  # clip is 0.05


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_zero_1_to_3_agree(ranks: int, ragged: Path, teacher_run: Path, tmp_path: Path) -> None:
    runs = []
    for stage in (1, 2, 3):
        (tmp_path / str(stage)).mkdir()
        more = {"engine__dtype": "bf16", "teacher__dtype": "bf16"}
        runs.append(run(tmp_path / str(stage), ragged, teacher_run, ranks, 2, stage, **more))
    losses = [[row["loss"] for row in rows(r, "train")] for r in runs]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=5e-3)


# ------------------------------------------------------------------------------------------------ launchers


@cache
def environ() -> dict[str, str]:
    """As a shell has it, without ranks of a test run before."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "distill"],
    "deepspeed": [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus=2",
        "--master_port=0",
        "--module",
        "distill",
    ],
}


@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_launchers_start_two_ranks_of_the_same_run(
    launcher: str, reference: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    from tiny import free_port

    command = [part.replace("port=0", f"port={free_port()}") for part in LAUNCHERS[launcher]]
    changes = {"optim__eps": 1e-3, "log__every": 1}
    arguments = ["train", *settings(ragged, tmp_path / "run", **changes)]
    ended = subprocess.run(
        [sys.executable, *command, *arguments], env=environ(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    distill(["train", *settings(ragged, tmp_path / "alone", **changes)], tmp_path).ok()
    assert_close_rows(tmp_path / "run", tmp_path / "alone")
