"""The studies of objectives at the smallest scale: their arms, what they measure, that they go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import config, distill, write_text_shards

from data_prep.shards import ShardReader
from distill.config import OBJECTIVES
from distill.data import Samples
from distill.experiments import few_teacher_calls, objectives
from distill.experiments.extreme_classification import (
    AT,
    RELEVANT,
    Linear,
    Setting,
    draw,
    one_seed,
    precision,
    report,
)
from distill.pretrained import load_model

SMALL = Setting(
    classes=30,
    features=6,
    bottleneck=3,
    teacher_samples=2000,
    student_samples=200,
    test_samples=300,
    steps=60,
)
QUICK = [
    "steps=20",
    "save.trajectory_every=10",
    "log.every=2",
    "log.eval_every=10",
    "log.eval_samples=16",
    "model.overrides.hidden_size=16",
]


def test_every_objective_has_an_arm_and_every_arm_holds(tmp_path: Path) -> None:
    named = {name for weights in objectives.ARMS.values() for name in weights}
    assert named == set(OBJECTIVES) - {"preference"}  # goes on from a trained student, which these are not
    for weights in objectives.ARMS.values():
        made = objectives.student_config(tmp_path, tmp_path / "run", weights, [])
        assert made.objective.weights == weights
        assert bool(made.teacher.trajectory) == (set(weights) != {"hard"})


def test_arms_have_folders_of_their_own_and_titles_with_their_weights() -> None:
    folders = {objectives.run_folder(Path("x"), arm, 0) for arm in objectives.ARMS}
    assert len(folders) == len(objectives.ARMS)
    assert objectives.title("forward_kl, hard") == "0.9 forward_kl, 0.1 hard"


@pytest.mark.filterwarnings("ignore")  # of transformers and torch, about each other
def test_a_model_is_as_near_as_can_be_to_itself(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    samples = Samples(config(shards, tmp_path).data, "validation", 0, shuffle=False)
    model = load_model("mlm", teacher_run / "model", torch.float32, samples.sequence_length)
    assert objectives.nearness(model, model, samples, 16, 8) == {"agreement": 1.0, "teacher_kl": 0.0}
    first = teacher_run / "trajectory" / "step_00000002"
    other = load_model("mlm", first, torch.float32, samples.sequence_length)
    found = objectives.nearness(other, model, samples, 16, 8)
    assert found["teacher_kl"] > 0
    assert found["agreement"] < 1


@pytest.mark.parametrize("number", [1, 7, 600])
def test_fewer_samples_are_spread_over_all_and_keep_the_validation(
    number: int, shards: Path, tmp_path: Path
) -> None:
    folder = few_teacher_calls.fewer_samples(shards, tmp_path / "few", number)
    whole, few = ShardReader(shards, "train"), ShardReader(folder, "train")
    assert len(few) == number
    for i in range(number):
        assert np.array_equal(few[i], whole[i * 600 // number])
    assert len(ShardReader(folder, "validation")) == len(ShardReader(shards, "validation"))
    assert few_teacher_calls.fewer_samples(shards, folder, 5) == folder  # what is there stays


def test_more_samples_than_there_are_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 600 samples, the budget asks for 601"):
        few_teacher_calls.fewer_samples(shards, tmp_path / "few", 601)


@pytest.mark.slow
def test_both_studies_end_in_their_tables_and_go_on_where_they_were(tmp_path: Path) -> None:
    out = tmp_path / "study"
    write_text_shards(out / "demo" / "shards")
    small = [
        *QUICK,
        "model.overrides.num_attention_heads=2",
        "model.overrides.num_key_value_heads=2",
        "batch_size=8",
    ]
    arms = ["hard labels", "ckd"]
    shown = objectives.study(out, arms, [0, 1], small)
    assert len(shown.splitlines()) == 4
    assert " ± " in shown
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob(objectives.FOUND)}
    assert len(stamps) == 4
    assert objectives.study(out, arms, [0, 1], small) == shown
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob(objectives.FOUND)}
    few = few_teacher_calls.study(out, [0], small)
    assert "3% (5 samples)" in few
    assert len(json.loads((out / "few_teacher_calls.json").read_text())["arms"]["KL and CKD"]) == 1


# ------------------------------------------------------------------------------------------------ many classes


def test_relevant_labels_are_five_different_ones_and_the_first_is_any_of_them() -> None:
    x, labels = draw(SMALL, 0)
    assert x.shape == (2500, 6)
    assert labels.shape == (2500, RELEVANT)
    assert all(len(set(row)) == RELEVANT for row in labels.tolist())


def test_precision_counts_the_relevant_among_the_best() -> None:
    model = Linear(Setting(classes=6, features=6), 6)
    with torch.no_grad():
        model.up.weight.copy_(torch.eye(6))
        model.up.bias.copy_(-torch.arange(6) / 100)  # of equals the first
    found = precision(model, torch.eye(6)[:2], torch.tensor([[0, 2, 3, 4, 5], [0, 2, 3, 4, 5]]))
    assert list(found) == [f"P@{k}" for k in AT]
    assert found["P@1"] == 0.5  # first x: class 0; second: class 1, which is not relevant
    assert found["P@3"] == pytest.approx((2 + 2) / 6)  # 0, 1, 2 and 1, 0, 2
    assert found["P@5"] == pytest.approx(0.8)


def test_one_seed_tells_every_arm_and_the_teacher_ranks_best() -> None:
    found = one_seed(SMALL, 0)
    assert found["teacher"]["P@5"] >= found["labels"]["P@5"]
    lines = report({0: found, 1: one_seed(SMALL, 1)}).splitlines()
    assert len(lines) == 2 + len(found)
    again = one_seed(SMALL, 0)
    assert {k: v["P@5"] for k, v in again.items()} == {k: v["P@5"] for k, v in found.items()}


def test_help_of_the_objectives_is_a_flag_of_train(tmp_path: Path) -> None:
    shown = distill(["train", "--help-objectives"], tmp_path).ok().output
    assert all(name in shown for name in OBJECTIVES)
