"""What saves memory changes nothing that is learned: optimizer and teacher in host memory, layers computed again.

Equal to the bit, but for two things. With the optimizer offloaded, DeepSpeed adds up the gradient's norm parameter by
parameter, so that clipping scales by a number that is rounded apart. A compiled trunk adds in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_elastic import engine_of, splits_all  # noqa: F401  # a fixture
from tiny import LENGTH, SIZES, VOCABULARY, Kill, config, distill, distill_on_ranks, rows, settings, weights
from watch import Watch

from distill.data import Samples
from distill.engine import Engine
from distill.objectives import Objective

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
RECOMPUTE = {"engine__activation_checkpointing": True}
OFFLOAD = {"engine__offload_optimizer": True}
COMPILE = {"engine__compile": True}
STEPS = 3


def sizes(architecture: str) -> dict[str, Any]:
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    task = "mlm" if "bert" in architecture else "clm"
    overrides = {**SIZES[architecture], positions: LENGTH}
    return {"data__task": task, "model__architecture": architecture, "model__overrides": overrides}


def train_step(engine: Engine, shards: Path, run_dir: Path, keys: dict[str, Any]) -> tuple[float, float]:
    """(loss, norm of the gradient) of one step on the same eight samples."""
    settled = config(shards, run_dir, **keys)
    batch = Samples(settled.data, "train", 0, shuffle=False)[np.arange(8)]
    sums = engine.forward(
        batch.inputs, batch.rows_N, batch.labels_N, None, Objective(settled.objective, VOCABULARY, 0.0)
    )
    engine.backward(sums.loss, float(len(batch.rows_N)))
    return float(sums.loss.detach()), float(engine.step(1e-3))


def trained(
    shards: Path, run_dir: Path, stage: int, dtype: str, keys: dict[str, Any]
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    engine = engine_of(shards, run_dir, stage, dtype, **keys)
    steps = [train_step(engine, shards, run_dir, keys) for _ in range(STEPS)]
    return steps, {name: tensor.clone() for name, tensor in engine.weights().items()}


@pytest.mark.parametrize(
    ("architecture", "stage", "dtype", "option"),
    [
        ("bert", 1, "fp32", RECOMPUTE),
        ("gpt2", 3, "bf16", RECOMPUTE),
        ("bert", 1, "bf16", OFFLOAD),
        ("bert", 3, "fp32", {**OFFLOAD, **RECOMPUTE}),
        pytest.param("gpt2", 2, "bf16", {**OFFLOAD, **RECOMPUTE}, marks=pytest.mark.slow),
        pytest.param("llama", 1, "fp32", RECOMPUTE, marks=pytest.mark.slow),
        pytest.param("gpt_neox", 2, "fp32", RECOMPUTE, marks=pytest.mark.slow),
        pytest.param("modernbert", 3, "fp32", RECOMPUTE, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_plain_ones_to_the_bit(
    architecture: str,
    stage: int,
    dtype: str,
    option: dict[str, Any],
    shards: Path,
    tmp_path: Path,
    splits_all: None,  # noqa: F811
) -> None:
    keys = {**sizes(architecture), "optim__clip": 0.0}
    plain, expected = trained(shards, tmp_path, stage, dtype, keys)
    saving, found = trained(shards, tmp_path, stage, dtype, {**keys, **option})
    assert [loss for loss, _ in saving] == [loss for loss, _ in plain]
    assert [norm for _, norm in saving] == pytest.approx([norm for _, norm in plain], rel=1e-5)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_clipped_steps_with_the_optimizer_offloaded_are_as_close_as_the_norm_is_rounded(
    stage: int,
    shards: Path,
    tmp_path: Path,
    splits_all: None,  # noqa: F811
) -> None:
    keys = {**sizes("bert"), "optim__clip": 0.05}
    plain, expected = trained(shards, tmp_path, stage, "fp32", keys)
    saving, found = trained(shards, tmp_path, stage, "fp32", {**keys, **OFFLOAD})
    assert np.allclose(saving, plain, rtol=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)


def test_model_that_was_loaded_has_its_dropout_from_the_first_step_on(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    """transformers loads models in eval mode; a run that goes on must not differ from one that has validated."""
    engine = engine_of(shards, tmp_path, 1, "fp32", model__init_from=str(teacher_run / "model"))
    assert all(module.training for module in engine.student.modules())


def test_layers_computed_again_keep_less_for_the_backward(shards: Path, tmp_path: Path) -> None:
    def peak(option: dict[str, Any]) -> int:
        keys = {**sizes("bert"), **option}
        keys["model__overrides"] = {**keys["model__overrides"], "num_hidden_layers": 8}
        engine = engine_of(shards, tmp_path, 0, "fp32", **keys)
        train_step(engine, shards, tmp_path, keys)  # what is made once
        with Watch(VOCABULARY) as watch:
            train_step(engine, shards, tmp_path, keys)
        return watch.peak_bytes

    assert peak(RECOMPUTE) < 0.5 * peak({})


def test_run_offloaded_and_recomputed_is_the_plain_run_and_goes_on_without(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "teacher__trajectory": str(teacher_run / "trajectory"),
        "schedule__kind": "explicit",
        "schedule__stages": [[0, 2], [4, 8], [9, 24]],
        "optim__clip": 0.0,
    }
    distill(["train", *settings(shards, tmp_path / "calm", **keys)], tmp_path).ok()
    offloaded = {**OFFLOAD, **RECOMPUTE, "teacher__zero_stage": 3, "teacher__offload": True}
    arguments = ["train", *settings(shards, tmp_path / "run", **keys, **offloaded)]
    for call in (8, 7):  # of steps 8 and, from the checkpoint of step 5 on, 12
        assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", call)).code == -9
    distill(["train", *settings(shards, tmp_path / "run", **keys)], tmp_path).ok()
    assert_same_run_but_the_norm(tmp_path / "run", tmp_path / "calm")


def assert_same_run_but_the_norm(run_dir: Path, calm: Path) -> None:
    found, expected = rows(run_dir), rows(calm)
    norms = [
        [row.pop("grad_norm") for row in all_rows if "grad_norm" in row] for all_rows in (found, expected)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert found == expected
    assert weights(run_dir) == weights(calm)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_offload_as_they_would_not(
    stage: int, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "teacher__trajectory": str(teacher_run / "trajectory"),
        "engine__zero_stage": stage,
        "engine__dtype": "bf16",
        "optim__clip": 0.0,
        "teacher__zero_stage": 3,
    }
    for name, option in (("calm", {}), ("run", {**OFFLOAD, **RECOMPUTE, "teacher__offload": True})):
        for ended in distill_on_ranks(
            ["train", *settings(shards, tmp_path / name, **keys, **option)], tmp_path, 2
        ):
            ended.ok()
    assert_same_run_but_the_norm(tmp_path / "run", tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "option"), [("bert", COMPILE), ("gpt2", {**COMPILE, **RECOMPUTE, **OFFLOAD})]
)
def test_compiled_trunk_learns_the_same(
    architecture: str, option: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    keys = {**sizes(architecture), "optim__eps": 1e-3}
    plain, expected = trained(shards, tmp_path, 1, "fp32", keys)
    compiled, found = trained(shards, tmp_path, 1, "fp32", {**keys, **option})
    assert np.allclose(compiled, plain, rtol=2e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)
