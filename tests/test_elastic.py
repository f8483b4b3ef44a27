"""A run goes on with other numbers of ranks, other micro-batches and in other ZeRO stages, and learns the same.

The same samples, teacher and learning rate to the bit; losses, norms and weights as far as the order of sums allows. That is
the tolerance of test_equivalence, for the reasons told there: the largest difference found here was 4e-7 of a loss, 2.1e-5
in bf16.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from test_equivalence import assert_close_rows, parameters
from tiny import (
    LENGTH,
    SIZES,
    VOCABULARY,
    Kill,
    config,
    distill,
    distill_on_ranks,
    rows,
    settings,
    split_every_weight,
)

from distill import engine as engine_module
from distill.build import student_model
from distill.data import Samples
from distill.distributed import start
from distill.engine import Engine
from distill.objectives import Objective
from distill.zero_files import ZeroFiles

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]
RUN: dict[str, Any] = {
    "batch_size": 12,
    "schedule__kind": "explicit",
    "schedule__stages": [[0, 2], [4, 8], [9, 24]],
    "objective__weights": {"forward_kl": 1.0, "hard": [[0, 0.0], [1, 0.5]]},
    "optim__eps": 1e-3,
    "optim__clip": 0.05,
    "optim__weight_decay": 0.1,
    "log__every": 2,  # windows stay open over a stop
}
STEPS_A_LEG = 3  # 12 in all
Leg = tuple[int, int, int]  # ranks, sequences a micro-batch, ZeRO stage
LEGS = {
    "ranks 4, 2, 1, 4": [(4, 0, 1), (2, 0, 1), (1, 0, 1), (4, 0, 1)],
    "stages 1, 3, 2, 0": [(1, 0, 1), (1, 0, 3), (1, 0, 2), (1, 0, 0)],
    "both, and weights that 3 ranks can't divide": [(2, 2, 0), (3, 2, 3), (1, 4, 1), (2, 0, 3)],
    "micro-batches": [(1, 2, 1), (1, 12, 1), (2, 1, 1), (2, 6, 1)],
}


@pytest.fixture
def splits_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "deepspeed_settings", engine_module.deepspeed_settings)  # to be undone
    split_every_weight()


def run(shards: Path, teacher_run: Path, run_dir: Path, **changes: Any) -> list[str]:
    trajectory = str(teacher_run / "trajectory")
    return ["train", *settings(shards, run_dir, teacher__trajectory=trajectory, **{**RUN, **changes})]


def on_legs(legs: list[Leg], folder: Path, arguments: list[str]) -> list[str]:
    """Run `arguments` with each layout for STEPS_A_LEG steps, the last to the end. Returns what rank 0 of each said."""
    said = []
    for number, (ranks, micro, stage) in enumerate(legs):
        last = number == len(legs) - 1
        stop = None if last else Kill("distill.engine:Engine.step", STEPS_A_LEG, number=signal.SIGTERM)
        here = [*arguments, f"micro_batch_size={micro}", f"engine.zero_stage={stage}"]
        ended = [distill(here, folder, stop)] if ranks == 1 else distill_on_ranks(here, folder, ranks, stop)
        assert [e.code for e in ended] == [0 if last else 143] * ranks, ended[0].output
        said.append(ended[0].output)
    return said


@pytest.fixture(scope="module")
def undisturbed(ragged: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    distill(run(ragged, teacher_run, folder / "run"), folder).ok()
    return folder / "run"


@pytest.mark.parametrize(
    "legs", [pytest.param(name, marks=pytest.mark.slow) if name == "micro-batches" else name for name in LEGS]
)
def test_layouts_that_change_at_every_stop_change_nothing_that_is_learned(
    legs: str, undisturbed: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    said = on_legs(LEGS[legs], tmp_path, run(ragged, teacher_run, tmp_path / "run"))
    for before, after, text in zip(LEGS[legs], LEGS[legs][1:], said[1:], strict=False):
        told = f"saved by {before[0]} rank(s) in ZeRO {before[2]}, dealt anew to {after[0]} rank(s) in ZeRO {after[2]}"
        assert (told in text) == ((before[0], before[2]) != (after[0], after[2])), text
    assert_close_rows(tmp_path / "run", undisturbed)
    for found, expected in zip(rows(tmp_path / "run", "train"), rows(undisturbed, "train"), strict=True):
        for key in ("samples", "lr", "teacher_step", "temperature", "weight_hard"):
            assert found[key] == expected[key]
    torch.testing.assert_close(parameters(tmp_path / "run"), parameters(undisturbed), rtol=0, atol=2e-6)


def test_bf16_run_goes_on_in_another_layout(ragged: Path, teacher_run: Path, tmp_path: Path) -> None:
    bf16 = {"engine__dtype": "bf16", "teacher__dtype": "bf16"}
    distill(run(ragged, teacher_run, tmp_path / "calm", **bf16), tmp_path).ok()
    on_legs(
        [(1, 0, 1), (2, 0, 1), (1, 0, 3), (1, 0, 2)],
        tmp_path,
        run(ragged, teacher_run, tmp_path / "run", **bf16),
    )
    found, expected = (rows(tmp_path / name, "train") for name in ("run", "calm"))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=5e-4)


def test_decisions_of_a_schedule_that_follows_the_student_survive(
    ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    waits: dict[str, Any] = {
        "schedule__kind": "saturation",
        "schedule__stages": [],
        "schedule__checkpoints": [2, 8, 24],
        "schedule__patience": 2,
        "schedule__min_gain": 1.0,  # is never reached: each stage ends with the second validation
        "log__eval_every": 2,
    }
    distill(run(ragged, teacher_run, tmp_path / "calm", **waits), tmp_path).ok()
    legs = [(1, 0, 1), (2, 0, 1), (1, 0, 3)]
    on_legs(legs, tmp_path, run(ragged, teacher_run, tmp_path / "run", **waits))
    found, expected = (
        json.loads((tmp_path / name / "schedule.json").read_text()) for name in ("run", "calm")
    )
    assert found == expected
    assert len(expected["stages"]) == 3
    assert_close_rows(tmp_path / "run", tmp_path / "calm")


def test_kill_while_weights_are_dealt_anew_leaves_the_checkpoint_as_it_was(
    undisturbed: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    arguments = run(ragged, teacher_run, tmp_path / "run")
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 7)).code == -9
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    arguments.append("engine.zero_stage=2")
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine._set", 20)).code == -9
    assert {p: p.read_bytes() for p in saved.parent.rglob("*") if p.is_file()} == before
    assert "dealt anew" in distill(arguments, tmp_path).ok().output
    assert_close_rows(tmp_path / "run", undisturbed)


# ------------------------------------------------------------------------------------------------ one process


def engine_of(shards: Path, run_dir: Path, stage: int, dtype: str, **changes: Any) -> Engine:
    keys = {
        "engine__zero_stage": stage,
        "engine__dtype": dtype,
        "batch_size": 4,
        "optim__eps": 1e-3,
        **changes,
    }
    settled = config(shards, run_dir, **keys)
    return Engine(
        student_model(settled, Samples(settled.data, "train", 0, shuffle=False)), settled, start(), 1
    )


def train_step(engine: Engine, shards: Path, run_dir: Path) -> float:
    settled = config(shards, run_dir)
    batch = Samples(settled.data, "train", 0, shuffle=False)[np.arange(4)]
    objective = Objective(settled.objective, VOCABULARY, 0.0)
    sums = engine.forward(batch.inputs, batch.rows_N, batch.labels_N, None, objective)
    engine.backward(sums.loss, float(len(batch.rows_N)))
    engine.step(1e-3)
    return float(sums.loss.detach())


def stored(engine: Engine, folder: Path, stage: int) -> dict[str, list[torch.Tensor]]:
    files = ZeroFiles(folder / "engine", stage, 1, list(engine._parameters))
    assert files.step == 2.0
    shapes = {n: getattr(p, "ds_numel", p.numel()) for n, p in engine._parameters.items()}
    return {name: files.whole(name, numel) for name, numel in shapes.items()}


FAST = [("fp32", 0, 1), ("fp32", 1, 3), ("fp32", 3, 2), ("fp32", 2, 0), ("bf16", 1, 3), ("bf16", 3, 1)]
PAIRS = [("fp32", a, b) for a in range(4) for b in range(4) if a != b]
PAIRS += [("bf16", a, b) for a in range(1, 4) for b in range(1, 4) if a != b]


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [pair if pair in FAST else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS],
)
def test_every_stage_takes_up_every_other_to_the_bit(
    dtype: str, before: int, after: int, shards: Path, tmp_path: Path, splits_all: None
) -> None:
    assert_taken_up(dtype, before, after, shards, tmp_path)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 0)])
def test_weights_that_stage_3_keeps_whole_for_being_small_are_taken_up_too(
    before: int, after: int, shards: Path, tmp_path: Path
) -> None:
    assert_taken_up("fp32", before, after, shards, tmp_path)


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("offloaded", ["before", "after"])
def test_optimizer_state_goes_to_the_host_and_back_to_the_bit(
    offloaded: str, before: int, after: int, shards: Path, tmp_path: Path, splits_all: None
) -> None:
    changes = {f"{offloaded}_changes": {"engine__offload_optimizer": True}}
    assert_taken_up("fp32", before, after, shards, tmp_path, **changes)


def assert_taken_up(
    dtype: str,
    before: int,
    after: int,
    shards: Path,
    tmp_path: Path,
    before_changes: Mapping[str, Any] = MappingProxyType({}),
    after_changes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    one = engine_of(shards, tmp_path, before, dtype, **before_changes)
    for _ in range(2):
        train_step(one, shards, tmp_path)
    one.save(tmp_path / "one")
    other = engine_of(shards, tmp_path, after, dtype, seed=1, **after_changes)
    other.load(tmp_path / "one", 1, before)
    weights, expected = other.weights(), one.weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    other.save(tmp_path / "other")
    found = stored(other, tmp_path / "other", after)
    for name, tensors in stored(one, tmp_path / "one", before).items():
        assert all(map(torch.equal, found[name], tensors)), name
    losses = [[train_step(engine, shards, tmp_path) for _ in range(3)] for engine in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6 if dtype == "fp32" else 5e-3)


def test_moments_are_those_of_plain_adamw(shards: Path, tmp_path: Path) -> None:
    engine = engine_of(shards, tmp_path, 0, "fp32")
    for _ in range(2):
        train_step(engine, shards, tmp_path)
    engine.save(tmp_path / "saved")
    for name, (weights, mean, squared) in stored(engine, tmp_path / "saved", 0).items():
        parameter = engine._parameters[name]
        state = engine._engine.optimizer.state[parameter]
        assert torch.equal(weights, parameter.flatten())
        assert torch.equal(mean, state["exp_avg"].flatten())
        assert torch.equal(squared, state["exp_avg_sq"].flatten())


def test_checkpoint_of_another_model_is_refused(shards: Path, tmp_path: Path) -> None:
    one = engine_of(shards, tmp_path, 1, "fp32")
    train_step(one, shards, tmp_path)
    one.save(tmp_path / "one")
    sizes = {**SIZES["bert"], "max_position_embeddings": 2 * LENGTH}
    other = engine_of(shards, tmp_path, 2, "fp32", model__overrides=sizes)
    with pytest.raises(
        ValueError, match=r"one can't be read .* has 1024 numbers of .*position_emb.*, the model 2048"
    ):
        other.load(tmp_path / "one", 1, 1)
    with pytest.raises(ValueError, match=r"one can't be read .*No such file"):
        other.load(tmp_path / "one", 4, 1)
