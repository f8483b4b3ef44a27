"""Checkpoints appear whole, the newest are kept, and hold all that decides the next step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_run, config, distill, settings

from distill import checkpoint
from distill.build import build_run
from distill.checkpoint import TrainState, resume
from distill.distributed import start
from distill.engine import saved_weights
from distill.files import publish_folder, writing
from distill.run_folder import saved_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other


@pytest.mark.parametrize(("keep", "kept"), [(1, [12]), (2, [9, 12]), (99, [3, 6, 9, 12])])
def test_only_the_newest_are_kept(keep: int, kept: list[int], shards: Path, tmp_path: Path) -> None:
    distill(["train", *settings(shards, tmp_path / "run", save__every=3, save__keep=keep)], tmp_path).ok()
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == [f"step_{step:08d}" for step in kept]
    assert [p.name for p in saved_checkpoints(tmp_path / "run")] == folders


def test_state_holds_position_and_the_open_window_of_metrics(shards: Path, tmp_path: Path) -> None:
    distill(["train", *settings(shards, tmp_path / "run", steps=10, save__keep=9)], tmp_path).ok()
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000005" / "state.json").read_text())
    assert (state["step"], state["consumed"], state["world_size"]) == (5, 40, 1)
    assert state["tokens"] == 40 * 32
    assert state["window"]["tokens"] == 2 * 8 * 32  # of steps 4 and 5: the last row was after step 3


def build(shards: Path, folder: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return build_run(config(shards, folder, **changes), start(), folder)


def test_folder_without_its_mark_is_no_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    half = tmp_path / "run" / "checkpoints" / "step_00000005"
    (half / "engine").mkdir(parents=True)
    cut_off = tmp_path / "run" / "checkpoints" / "step_00000007.tmp"
    cut_off.mkdir()
    (cut_off / "state.json").write_text("{}")
    assert saved_checkpoints(tmp_path / "run") == []
    assert resume(tmp_path / "run", run.engine, "data", run.world) == TrainState()
    assert not cut_off.exists()


def test_weights_and_optimizer_come_back(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    with torch.no_grad():
        for parameter in run.engine.model.parameters():
            parameter.fill_(0.5)
    state = TrainState(step=3, consumed=24, tokens=7.0, window={"tokens": 1.0})
    # DeepSpeed keeps fp32 master weights apart: what is set above is not what a step would start from.
    checkpoint.save(tmp_path / "run", run.engine, state, "data", run.world, keep=2)
    other = build(shards, tmp_path / "run", seed=9)
    assert resume(tmp_path / "run", other.engine, "data", other.world) == state
    assert all((p == 0.5).all() for p in other.engine.model.parameters())


def test_checkpoint_of_other_data_or_ranks_is_refused(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    checkpoint.save(tmp_path / "run", run.engine, TrainState(step=3), "data", run.world, keep=2)
    with pytest.raises(ValueError, match="was trained on other samples"):
        resume(tmp_path / "run", run.engine, "other", run.world)
    path = tmp_path / "run" / "checkpoints" / "step_00000003" / "state.json"
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 4'))
    with pytest.raises(ValueError, match="was written by 4 ranks, this run has 1: start it with 4"):
        resume(tmp_path / "run", run.engine, "data", run.world)


def test_weights_are_read_without_an_engine(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    checkpoint.save(tmp_path / "run", run.engine, TrainState(step=3), "data", run.world, keep=2)
    weights = saved_weights(saved_checkpoints(tmp_path / "run")[0])
    own = dict(run.engine.model.named_parameters())
    assert weights.keys() >= own.keys()
    for name, parameter in own.items():
        assert torch.equal(weights[name], parameter)


def test_older_checkpoint_serves_when_the_newest_is_removed(shards: Path, tmp_path: Path) -> None:
    """What the message of a checkpoint that can not be read advises."""
    import shutil

    arguments = ["train", *settings(shards, tmp_path / "run", save__every=4)]
    distill(arguments, tmp_path).ok()
    calm = shutil.copytree(tmp_path / "run", tmp_path / "calm")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").unlink()
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", Path(calm))


def test_damaged_checkpoint_is_named(shards: Path, tmp_path: Path) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run")]
    distill(arguments, tmp_path).ok()
    (tmp_path / "run" / "result.json").unlink()
    newest = tmp_path / "run" / "checkpoints" / "step_00000012"
    for path in newest.rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    ended = distill(arguments, tmp_path)
    assert ended.code == 2, ended.output
    assert f"{newest}" in ended.output
    assert "remove that folder to go on from an earlier checkpoint" in ended.output


# ------------------------------------------------------------------------------------------------ files


def test_published_folder_appears_under_its_name_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.tmp" / "deep").mkdir(parents=True)
    (tmp_path / "a.tmp" / "deep" / "file").write_text("x")
    publish_folder(tmp_path / "a.tmp", tmp_path / "a")
    assert (tmp_path / "a" / "deep" / "file").read_text() == "x"
    assert not (tmp_path / "a.tmp").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_fault_in_writing_a_folder_names_it_and_removes_it(error: Exception, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    with pytest.raises(OSError, match=r"half can't be written: .* MB are free there"), writing(folder):
        folder.mkdir()
        (folder / "file").touch()
        raise error
    assert not folder.exists()


def test_fault_on_another_rank_leaves_the_folder_to_the_main_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="can't be written"), writing(tmp_path / "half", removes=False):
        (tmp_path / "half").mkdir()
        raise OSError(28, "No space left on device")
    assert (tmp_path / "half").exists()


def test_other_ranks_resume_from_the_checkpoint_that_rank_0_chose(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(shards, tmp_path / "run")
    for step in (3, 5):
        checkpoint.save(tmp_path / "run", run.engine, TrainState(step=step), "data", run.world, keep=2)
    monkeypatch.setattr(checkpoint, "from_main", lambda step, world: 3)
    assert resume(tmp_path / "run", run.engine, "data", run.world).step == 3
