"""Whole runs that prune: kills, ranks and ZeRO change nothing of what is pruned, and the export opens smaller.

Tolerances are those of test_equivalence, for the reasons told there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_elastic import on_legs
from test_equivalence import assert_close_rows, parameters
from tiny import (
    LENGTH,
    SIZES,
    Kill,
    assert_same_run,
    distill,
    distill_on_ranks,
    rows,
    settings,
)
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]
# 64 inner units: 64 until the warm-up ends, 32 from step 8 on.
PRUNED: dict[str, Any] = {
    "model__prune_to": {"ffn": 0.5},
    "model__prune_until": 0.6,
    "optim__warmup_share": 0.1,
    "micro_batch_size": 4,
    "log__every": 1,
}
STEADY = {"optim__eps": 1e-3, "optim__clip": 0.05, "objective__weights": {"forward_kl": 1.0}}


def run(shards: Path, teacher_run: Path, run_dir: Path, **changes: Any) -> list[str]:
    """A student that starts as its teacher, and learns with the paper's terms but for those on attention."""
    final = teacher_run / "trajectory" / "step_00000024"
    start = {
        "model__init_from": str(final),
        "teacher__trajectory": str(final.parent),
        "objective__weights": {"forward_kl": 1.0, "hard": 1.0, "hidden_square": 0.1},
    }
    return ["train", *settings(shards, run_dir, **{**start, **PRUNED, **changes})]


def width(folder: Path) -> int:
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert {layer.intermediate.dense.out_features for layer in model.bert.encoder.layer} == {
        model.config.intermediate_size
    }
    return int(model.config.intermediate_size)


@pytest.fixture(scope="module")
def calm(shards: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    distill(run(shards, teacher_run, folder / "run"), folder).ok()
    return folder / "run"


def test_student_shrinks_as_it_learns_and_its_smaller_export_has_the_runs_own_validation(
    calm: Path, shards: Path, tmp_path: Path
) -> None:
    left = [row["ffn_left"] for row in rows(calm, "train")]
    assert left == sorted(left, reverse=True)
    assert (left[0], left[6], left[11]) == (64, 32, 32)
    assert width(calm / "model") == 32
    arguments = [f"data.shards={shards}", "engine.dtype=fp32", "log.eval_samples=16", "batch_size=8"]
    found = json.loads(
        distill(["eval", str(calm / "model"), *arguments], tmp_path).ok().output.splitlines()[-1]
    )
    own = json.loads((calm / "result.json").read_text())
    assert found["hard"] == pytest.approx(own["hard"], rel=1e-5)
    assert found["accuracy"] == own["accuracy"]


def test_killed_while_it_prunes_it_goes_on_to_the_same_bits_and_is_exported_on_its_way(
    calm: Path, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    arguments = run(shards, teacher_run, tmp_path / "run")
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 7)).code == -9
    distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path).ok()
    at_5 = rows(calm, "train")[4]["ffn_left"]
    assert 32 < at_5 < 64
    assert width(tmp_path / "out") == at_5
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", calm)
    distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "last")], tmp_path).ok()
    assert width(tmp_path / "last") == 32


def test_gates_that_a_disk_has_changed_make_the_checkpoint_a_damaged_one(
    calm: Path, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    arguments = run(shards, teacher_run, tmp_path / "run", save__every=3)
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 8)).code == -9
    gates = tmp_path / "run" / "checkpoints" / "step_00000006" / "gates.pt"
    content = bytearray(gates.read_bytes())
    content[len(content) // 2] ^= 1
    gates.write_bytes(content)
    said = distill(arguments, tmp_path).ok().output
    assert "step_00000006 is damaged (gates.pt has changed since it was written" in said
    assert rows(tmp_path / "run") == rows(calm)


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, 3), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 0, marks=pytest.mark.slow),
     pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(4, 3, marks=pytest.mark.slow)],
)  # fmt: skip
def test_ranks_and_split_weights_prune_the_same_units(
    ranks: int, stage: int, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    distill(run(shards, teacher_run, tmp_path / "whole", **STEADY), tmp_path).ok()
    changes = {**STEADY, "engine__zero_stage": stage, "micro_batch_size": 2}
    arguments = run(shards, teacher_run, tmp_path / "run", **changes)
    ended = [distill(arguments, tmp_path)] if ranks == 1 else distill_on_ranks(arguments, tmp_path, ranks)
    for one in ended:
        one.ok()
    assert width(tmp_path / "run" / "model") == 32
    assert_close_rows(tmp_path / "run", tmp_path / "whole")
    # Another unit in place of one would differ by a hundred thousand times as much.
    torch.testing.assert_close(
        parameters(tmp_path / "run"), parameters(tmp_path / "whole"), rtol=0, atol=2e-6
    )


@pytest.mark.slow
def test_layouts_that_change_at_every_stop_prune_the_same_units(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    distill(run(shards, teacher_run, tmp_path / "calm", **STEADY), tmp_path).ok()
    legs = [(1, 0, 1), (2, 2, 3), (4, 2, 0), (1, 0, 2)]
    on_legs(legs, tmp_path, run(shards, teacher_run, tmp_path / "run", **STEADY))
    assert width(tmp_path / "run" / "model") == 32
    assert_close_rows(tmp_path / "run", tmp_path / "calm")
    torch.testing.assert_close(parameters(tmp_path / "run"), parameters(tmp_path / "calm"), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_killed_while_they_prune_go_on_to_the_same_bits(
    stage: int, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    for name in ("calm", "run"):
        arguments = run(shards, teacher_run, tmp_path / name, engine__zero_stage=stage)
        if name == "run":
            first, _ = distill_on_ranks(arguments, tmp_path, 2, Kill("distill.engine:Engine.step", 7))
            assert first.code == -9, first.output
            distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path).ok()
            assert 32 < width(tmp_path / "out") < 64
        for one in distill_on_ranks(arguments, tmp_path, 2):
            one.ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")


def test_llama_loses_units_and_heads_in_bf16_with_layers_computed_again(shards: Path, tmp_path: Path) -> None:
    """From random weights: pruning needs no teacher."""
    sizes = {**SIZES["llama"], "max_position_embeddings": LENGTH}
    changes = {
        **PRUNED,
        "data__task": "clm",
        "model__architecture": "llama",
        "model__overrides": {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2},
        "model__prune_to": {"ffn": 0.25, "heads": 0.5},
        "engine__dtype": "bf16",
        "engine__activation_checkpointing": True,
    }
    distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path).ok()
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (16, 2, 1)
    assert (config.head_dim, config.hidden_size, model.dtype) == (8, 32, torch.bfloat16)


def test_pruning_that_can_not_be_is_refused_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model__prune_to": {"ffn": 0.001}}
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert ended.code == 2, ended.output
    assert "model.prune_to.ffn=0.001 leaves 0 of 64 in each layer" in ended.output
    assert not (tmp_path / "run" / "config.yaml").exists()
