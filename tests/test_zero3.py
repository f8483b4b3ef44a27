"""ZeRO 3: weights split over the ranks, and gathered for the fused head, change nothing of a run.

Every weight is split here, also those that DeepSpeed would leave whole for being small (tiny.split_every_weight).
Tolerances are those of test_equivalence, for the reasons told there.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
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
    weights,
)
from transformers import AutoModelForMaskedLM

from distill import engine
from distill.build import student_model
from distill.data import Samples
from distill.distributed import start
from distill.models import flops_per_step, work_of
from distill.objectives import Objective

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore"),
]  # of DeepSpeed and torch, about each other
# Ranks have unequal numbers of samples to validate on, one of them a batch more.
SHORT = {"steps": 6, "save__every": 3, "log__every": 1, "log__eval_every": 4, "log__eval_samples": 9}
STEADY = {**SHORT, "optim__eps": 1e-3, "optim__clip": 0.05, "micro_batch_size": 2}


def overrides(architecture: str, tied: bool) -> dict[str, Any]:
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    return {**SIZES[architecture], positions: LENGTH, "tie_word_embeddings": tied}


def run_on_two_ranks(arguments: list[str], folder: Path, kill: Kill | None = None) -> None:
    first, second = distill_on_ranks(arguments, folder, 2, kill)
    if kill is None:
        first.ok()
        second.ok()
    else:
        assert first.code == -kill.number, first.output


CASES = [
    ("bert", True),
    ("llama", False),
    pytest.param("bert", False, marks=pytest.mark.slow),
    pytest.param("gpt2", True, marks=pytest.mark.slow),
    pytest.param("gpt_neox", False, marks=pytest.mark.slow),
    pytest.param("modernbert", True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_two_ranks_with_split_weights_are_one_rank_with_whole_ones(
    architecture: str, tied: bool, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {**STEADY, "model__architecture": architecture}
    changes["model__overrides"] = overrides(architecture, tied)
    if "bert" in architecture:
        changes |= {
            "teacher__trajectory": str(teacher_run / "trajectory"),
            "objective__weights": {"forward_kl": 1.0, "hard": 0.5},
        }
    else:
        changes["data__task"] = "clm"
    distill(["train", *settings(ragged, tmp_path / "whole", **changes)], tmp_path).ok()
    split = settings(ragged, tmp_path / "split", **changes, engine__zero_stage=3)
    run_on_two_ranks(["train", *split], tmp_path)
    assert_close_rows(tmp_path / "split", tmp_path / "whole")
    torch.testing.assert_close(
        parameters(tmp_path / "split"), parameters(tmp_path / "whole"), rtol=0, atol=2e-6
    )


def test_split_run_killed_goes_on_to_the_same_bits_and_is_exported_on_its_way(
    shards: Path, tmp_path: Path
) -> None:
    changes = {**SHORT, "engine__zero_stage": 3, "save__trajectory_every": 2, "save__every": 4}
    run_on_two_ranks(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path)
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    run_on_two_ranks(arguments, tmp_path, Kill("distill.engine:Engine.step", 6, number=signal.SIGKILL))
    distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path).ok()
    left = tmp_path / "run" / "trajectory"
    at_4 = (left / "step_00000004" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == at_4
    run_on_two_ranks(arguments, tmp_path)
    assert rows(tmp_path / "run") == rows(tmp_path / "calm")
    assert weights(tmp_path / "run") == weights(tmp_path / "calm")
    assert json.loads((left / "manifest.json").read_text())["complete"]
    for path in (tmp_path / "calm" / "trajectory").rglob("*.safetensors"):
        assert (left / path.parent.name / path.name).read_bytes() == path.read_bytes()
    _, report = AutoModelForMaskedLM.from_pretrained(left / "step_00000006", output_loading_info=True)
    assert not any(report.values())


# ------------------------------------------------------------------------------------------------ one process


@pytest.fixture
def splits_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "deepspeed_settings", engine.deepspeed_settings)  # to be undone
    split_every_weight()


@pytest.mark.parametrize(("architecture", "tied"), [("bert", True), ("gpt2", True), ("llama", False)])
def test_final_layer_is_whole_inside_the_fused_head_and_split_between_steps(
    architecture: str, tied: bool, shards: Path, tmp_path: Path, splits_all: None
) -> None:
    task = "mlm" if architecture == "bert" else "clm"
    run = config(
        shards, tmp_path, engine__zero_stage=3, data__task=task, model__architecture=architecture,
        model__overrides=overrides(architecture, tied),
    )  # fmt: skip
    samples = Samples(run.data, "train", 0, shuffle=False)
    model = student_model(run, samples)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work = work_of(model)
    split = engine.Engine(model, run, start(), 1)
    weight = model.get_output_embeddings().weight
    seen = []

    class Watched(Objective):
        def __call__(self, *given: Any) -> Any:
            seen.append(tuple(given[0].head.weight_VD.shape))
            return super().__call__(*given)

    objective = Watched(run.objective, VOCABULARY)

    batch = samples[np.arange(8)]
    for _ in range(2):  # DeepSpeed records the order of modules in the first, and looks ahead in the second
        assert weight.numel() == 0
        sums = split.forward(batch.inputs, batch.rows_N, batch.labels_N, None, objective)
        split.backward(sums.loss, 100.0)
        split.step(lr=0.0)
    assert weight.numel() == 0
    assert seen == [(VOCABULARY, 32)] * 2
    found = split.weights()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert flops_per_step(split.work, 1, 1, 1, True) == flops_per_step(work, 1, 1, 1, True) > 0
