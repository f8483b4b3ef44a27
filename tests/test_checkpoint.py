"""Checkpoints appear whole, the newest are kept, and hold all that decides the next step."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_run, config, distill, distill_on_ranks, rows, settings

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


def test_folder_that_was_cut_off_is_no_checkpoint(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
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


def test_checkpoint_of_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    checkpoint.save(tmp_path / "run", run.engine, TrainState(step=3), "data", run.world, keep=2)
    with pytest.raises(ValueError, match="was trained on other samples"):
        resume(tmp_path / "run", run.engine, "other", run.world)


def test_weights_are_read_without_an_engine(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    checkpoint.save(tmp_path / "run", run.engine, TrainState(step=3), "data", run.world, keep=2)
    weights = saved_weights(saved_checkpoints(tmp_path / "run")[0])
    own = dict(run.engine.model.named_parameters())
    assert weights.keys() >= own.keys()
    for name, parameter in own.items():
        assert torch.equal(weights[name], parameter)


# ------------------------------------------------------------------------------------------------ damage


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    """Of a number in the middle of the file: its size, and what torch makes of it, say nothing."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_after(mark: bytes, further: int) -> Callable[[Path], None]:
    """Of what the file says of its records, so many bytes after the last such mark."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[content.rindex(mark) + further] ^= 1
        path.write_bytes(content)

    return flip


def another_digit(path: Path) -> None:
    """Of the samples consumed: it stays good JSON."""
    text = path.read_text()
    path.write_text(re.sub(r'"consumed": (\d)', r'"consumed": 1\1', text, count=1))


OPTIMIZER = "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut off": (OPTIMIZER, cut_off, "optim_states.pt has 100 bytes, it was written with"),
    "empty": ("engine/mp_rank_00_model_states.pt", empty, "model_states.pt has 0 bytes, it was written with"),
    "gone": (OPTIMIZER, Path.unlink, "optim_states.pt has no bytes, it was written with"),
    "changed": (OPTIMIZER, flip_a_bit, "optim_states.pt has changed since it was written, in its record"),
    "record's head": (
        OPTIMIZER,
        flip_after(b"PK\x03\x04", 0),
        "optim_states.pt has changed since it was written",
    ),
    "record's checksum": (OPTIMIZER, flip_after(b"PK\x01\x02", 16), "has changed since it was written"),
    "record said to be encrypted": (
        OPTIMIZER,
        flip_after(b"PK\x01\x02", 8),
        "has changed since it was written",
    ),
    "mark gone": ("state.json", Path.unlink, "state.json is gone"),
    "digit of the mark changed": (
        "state.json",
        another_digit,
        "its content has changed since it was written",
    ),
    "mark empty": ("state.json", empty, "state.json can't be read"),
    "mark cut off": ("state.json", cut_off, "state.json can't be read"),
}


def finished(shards: Path, folder: Path, **changes: Any) -> list[str]:
    """Run to the end, keep a copy of it under `calm`, and forget that it ended. Returns the command."""
    arguments = ["train", *settings(shards, folder / "run", save__every=4, **changes)]
    distill(arguments, folder).ok()
    shutil.copytree(folder / "run", folder / "calm")
    shutil.rmtree(folder / "run" / "model")
    (folder / "run" / "result.json").unlink()
    return arguments


@pytest.mark.parametrize("damage", DAMAGE)
def test_older_checkpoint_serves_where_the_newest_is_damaged(
    damage: str, shards: Path, tmp_path: Path
) -> None:
    name, harm, sentence = DAMAGE[damage]
    arguments = finished(shards, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    newest, older = checkpoints / "step_00000012", checkpoints / "step_00000008"
    harm(newest / name)
    said = distill(arguments, tmp_path).ok().output
    assert re.search(rf"{newest} is damaged \(.*{sentence}.*going on from {older}", said), said
    assert_same_run(tmp_path / "run", tmp_path / "calm")
    found = sorted(p.name for p in checkpoints.iterdir())
    assert found == ["step_00000008", "step_00000012", "step_00000012.damaged"]


def test_no_whole_checkpoint_is_an_error_that_names_all_and_touches_none(
    shards: Path, tmp_path: Path
) -> None:
    arguments = finished(shards, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    for mark in checkpoints.glob("*/state.json"):
        empty(mark)
    ended = distill(arguments, tmp_path)
    assert ended.code == 2, ended.output
    assert f"no checkpoint in {checkpoints} is whole any more:\n  step_00000012: state.json" in ended.output
    assert "\n  step_00000008: state.json can't be read" in ended.output
    assert "remove that folder to start from the beginning" in ended.output
    assert len(list(checkpoints.iterdir())) == 2
    ended = distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path)
    assert ended.code == 2 and "has no whole checkpoint" in ended.output


def test_what_was_put_aside_before_gives_way(shards: Path, tmp_path: Path) -> None:
    arguments = finished(shards, tmp_path)
    newest = tmp_path / "run" / "checkpoints" / "step_00000012"
    newest.with_suffix(".damaged").mkdir()
    empty(newest / OPTIMIZER)
    distill(arguments, tmp_path).ok()
    assert (newest.with_suffix(".damaged") / "state.json").exists()


def test_damaged_checkpoint_does_not_push_out_the_last_whole_one(shards: Path, tmp_path: Path) -> None:
    run = build(shards, tmp_path / "run")
    for step in (3, 5):
        checkpoint.save(tmp_path / "run", run.engine, TrainState(step=step), "data", run.world, keep=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    empty(checkpoints / "step_00000005" / OPTIMIZER)
    checkpoint.save(tmp_path / "run", run.engine, TrainState(step=7), "data", run.world, keep=2)
    assert [p.name for p in saved_checkpoints(tmp_path / "run")] == [f"step_0000000{n}" for n in (3, 5, 7)]
    empty(checkpoints / "step_00000007" / OPTIMIZER)
    assert resume(tmp_path / "run", run.engine, "data", run.world).step == 3


@pytest.mark.dist
def test_damage_that_another_rank_finds_turns_all_away_from_it(shards: Path, tmp_path: Path) -> None:
    arguments = ["train", *settings(shards, tmp_path / "run", save__every=4)]
    for ended in distill_on_ranks(arguments, tmp_path, 2):
        ended.ok()
    first = rows(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000012"
    files = sorted(str(p.relative_to(newest)) for p in newest.rglob("*.pt"))
    flip_a_bit(newest / files[1])  # rank 1 reads every second file
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "result.json").unlink()
    said = [ended.ok().output for ended in distill_on_ranks(arguments, tmp_path, 2)]
    assert f"{newest} is damaged ({files[1]} has changed" in said[0]
    assert rows(tmp_path / "run") == first


def test_export_takes_the_newest_that_is_whole(shards: Path, tmp_path: Path) -> None:
    finished(shards, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    empty(checkpoints / "step_00000012" / OPTIMIZER)
    distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path).ok()
    shutil.rmtree(checkpoints / "step_00000012")
    distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again")], tmp_path).ok()
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()


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
