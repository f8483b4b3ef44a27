"""The loss is divided once by the global number of counted tokens: ranks, micro-batches and ZeRO change nothing.

Two layouts add the same numbers in another order, so they agree to fp32 rounding, about 1e-6 of a sum, grown by
the steps taken. A loss that averaged micro-batches or ranks would be off by percents on this data. AdamW runs with
eps 1e-3 here: with 1e-8 it divides gradients that are zero but for rounding (key biases) by their own size, and
walks off with a full learning rate in a direction that rounding chose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import config, distill, distill_on_ranks, rows, settings

from distill.data import Samples, train_batches

LAYOUTS = {
    "1 rank x 8": (1, 0, 1),
    "1 rank x 1 x 8 accumulated": (1, 1, 1),
    "2 ranks x 4": (2, 0, 1),
    "ZeRO 0": (1, 0, 0),
    **{
        f"ZeRO {stage}, {ranks} rank(s), accumulated": (ranks, 4 // ranks, stage)
        for stage in range(4)
        for ranks in (1, 2, 4)
    },
}
SLOW = {f"ZeRO {stage}, {ranks} rank(s), accumulated" for stage in range(4) for ranks in (1, 4)}
SLOW -= {"ZeRO 3, 4 rank(s), accumulated"}


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


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in LAYOUTS
        if name != "1 rank x 8"
    ],
)
def test_layout_changes_neither_losses_nor_weights(
    layout: str, reference: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    other = run(tmp_path, ragged, teacher_run, *LAYOUTS[layout])
    assert_close_rows(other, reference)
    torch.testing.assert_close(parameters(other), parameters(reference), rtol=0, atol=2e-6)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_student_and_teacher_both_split_over_the_ranks_are_whole_ones_on_one(
    ranks: int, reference: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    other = run(tmp_path, ragged, teacher_run, ranks, 4 // ranks, 3, teacher__zero_stage=3)
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
