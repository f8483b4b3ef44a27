"""A damaged trajectory is found out step by step, from few bytes; a healthy one passes, whoever left it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import distill, settings
from trajectories import (
    ARCHITECTURES,
    NAMES,
    STEPS,
    copy_as,
    edit_json,
    pickle_weights,
    replace_weights,
    rewrite,
    shards_of,
    train_checkpoints,
)

from distill.trajectory.audit.report import audit
from distill.trajectory.audit.verdicts import Audit, read_audit, refuse_bad_steps, store_audit
from distill.trajectory.index import index_trajectory
from distill.trajectory.manifest import BadTrajectory, load_manifest
from distill.trajectory.store import open_store
from distill.trajectory.tensors import INDEX


class Runs:
    """Trained checkpoints, each kind once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, architecture: str = "llama", seed: int = 0) -> Path:
        folder = self.root / f"{architecture}-{seed}"
        return folder if folder.exists() else train_checkpoints(folder, architecture, seed)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


KINDS = ("whole", "sharded")


def bad_kinds(found: Audit) -> dict[int, set[str]]:
    return {step: {finding.kind for finding in verdict.findings} for step, verdict in found.bad.items()}


# ------------------------------------------------------------------------------------------------ healthy ones


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", NAMES)
def test_healthy_trajectory_of_every_family_passes(
    family: str, kind: str, runs: Runs, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES.get(family, "llama")
    folder = copy_as(runs.get(architecture) / kind, tmp_path / "trajectory", family)
    manifest = index_trajectory(folder)
    steps = [step * 1000 for step in STEPS] if family == "multiberts" else list(STEPS)
    assert (manifest.family, list(manifest.checkpoints)) == (family, steps)
    assert (manifest.architecture, manifest.vocab_size, manifest.real_vocab_size) == (architecture, 128, 128)
    assert (manifest.dtype, manifest.tied) == ("float32", architecture in ("bert", "gpt2"))
    found = audit(manifest)
    assert {verdict.verdict for verdict in found.steps.values()} == {"ok"}, found.bad
    assert audit(manifest, full=True).bad == {}


def test_path_of_a_real_run_is_far_from_the_limits(runs: Runs, tmp_path: Path) -> None:
    """What the limits stand on: a run's own checkpoints make detours of about 1."""
    from distill.trajectory.audit.headers import read_headers, usual_layout
    from distill.trajectory.audit.neighbours import END_LIMIT, LIMIT, START_LIMIT, Track
    from distill.trajectory.audit.samples import choose_tensors, read_samples

    manifest = index_trajectory(copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia"))
    headers = read_headers(manifest)
    names = choose_tensors(usual_layout(headers))
    path = Track(read_samples(manifest, headers, names), names)
    triples = zip(STEPS, STEPS[1:], STEPS[2:], strict=False)
    assert max(path.detour(*triple) for triple in triples) < LIMIT / 2
    assert path.end_detour(*STEPS[:3]) < START_LIMIT / 4
    assert path.end_detour(*STEPS[:-4:-1]) < END_LIMIT / 2


# ------------------------------------------------------------------------------------------------ damage


def swap_in(step: int, other: int) -> Callable[[Path, Path], None]:
    return lambda folder, _: replace_weights(folder / f"step{step}", folder / f"step{other}")


def of_another_run(*steps: int) -> Callable[[Path, Path], None]:
    def damage(folder: Path, elsewhere: Path) -> None:
        for step in steps:
            replace_weights(folder / f"step{step}", elsewhere / str(step))

    return damage


def first_value(step: int, value: float) -> Callable[[Path, Path], None]:
    """In the middle of the first matrix, where it is looked at."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = min(name for name, tensor in tensors.items() if tensor.dim() > 1)
        flat = tensors[name].view(-1)
        flat[len(flat) // 2] = value

    return lambda folder, _: rewrite(shards_of(folder / f"step{step}")[0], change)


def to_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in tensors.items()}


def without_a_row(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t[:-1].contiguous() if t.shape[0] > 1 else t for name, t in tensors.items()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


ALL_FINAL = [2, 8, 24, 40, 48]


def final_weights_at_many(folder: Path, _: Path) -> None:
    for step in ALL_FINAL:
        replace_weights(folder / f"step{step}", folder / "step64")


def same_weights_everywhere(folder: Path, _: Path) -> None:
    for step in STEPS[1:]:
        replace_weights(folder / f"step{step}", folder / "step1")


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], dict[int, set[str]]]] = {
    "final weights under an early step": (swap_in(8, 64), {8: {"duplicate"}}),
    "early weights under the final step": (swap_in(64, 8), {64: {"duplicate"}}),
    "neighbours that can't be told apart": (swap_in(32, 40), {32: {"duplicate"}, 40: {"duplicate"}}),
    "final weights under many steps": (final_weights_at_many, {s: {"duplicate"} for s in ALL_FINAL}),
    "one checkpoint under all names": (same_weights_everywhere, {s: {"duplicate"} for s in STEPS}),
    "weights of another run": (of_another_run(32), {32: {"jump"}}),
    "several in a row of another run": (of_another_run(24, 32, 40), {s: {"jump"} for s in (24, 32, 40)}),
    "a first checkpoint of another run": (of_another_run(1), {1: {"jump"}}),
    "a last checkpoint of another run": (of_another_run(64), {64: {"jump"}}),
    "no weights": (lambda f, _: [p.unlink() for p in shards_of(f / "step8")], {8: {"missing"}}),
    "no config": (lambda f, _: (f / "step8/config.json").unlink(), {8: {"missing"}}),
    "truncated weights": (lambda f, _: truncate(shards_of(f / "step8")[-1]), {8: {"truncated"}}),
    "a header that is none": (
        lambda f, _: shards_of(f / "step8")[0].write_bytes(b"\xff" * 5000), {8: {"truncated"}}),
    "a NaN": (first_value(16, float("nan")), {16: {"nonfinite"}}),
    "an infinity": (first_value(16, float("inf")), {16: {"nonfinite"}}),
    "another dtype": (
        lambda f, _: [rewrite(p, to_half) for p in shards_of(f / "step16")], {16: {"dtype"}}),
    "another shape": (
        lambda f, _: [rewrite(p, without_a_row) for p in shards_of(f / "step16")], {16: {"shape"}}),
    "another tokenizer": (
        lambda f, _: edit_json(f / "step16/tokenizer.json", lambda c: c["model"]["vocab"].update(w77x=128)),
        {16: {"tokenizer"}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_at_its_step_alone(what: str, kind: str, runs: Runs, tmp_path: Path) -> None:
    damage, expected = DAMAGE[what]
    folder = copy_as(runs.get() / kind, tmp_path / "trajectory", "pythia")
    damage(folder, runs.get(seed=1) / kind)
    found = audit(index_trajectory(folder))
    assert {step: kinds & expected.get(step, kinds) for step, kinds in bad_kinds(found).items()} == expected


def first_shard(folder: Path) -> Path:
    return shards_of(folder)[0]


def shard_of(target: int, source: int) -> Callable[[Path, Path], None]:
    return lambda folder, _: shutil.copy(first_shard(folder / f"step{source}"), folder / f"step{target}")


def shard_of_another_run(folder: Path, elsewhere: Path) -> None:
    shutil.copy(first_shard(elsewhere / "16"), folder / "step16")


def index_that_lies(folder: Path, _: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        placed = content["weight_map"]
        placed[min(placed)], placed[max(placed)] = placed[max(placed)], placed[min(placed)]

    edit_json(folder / "step16" / INDEX, change)


SHARD_DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], dict[int, set[str]]]] = {
    "a shard of another step": (shard_of(16, 56), {16: {"mixed"}}),
    "a shard of another run": (shard_of_another_run, {16: {"mixed"}}),
    "a missing shard": (lambda f, _: first_shard(f / "step16").unlink(), {16: {"missing"}}),
    "no index": (lambda f, _: (f / "step16" / INDEX).unlink(), {16: {"index"}}),
    "an index that is none": (lambda f, _: (f / "step16" / INDEX).write_text("{"), {16: {"index"}}),
    "an index of other places": (index_that_lies, {16: {"index"}}),
    "an index that lacks a tensor": (
        lambda f, _: edit_json(f / "step16" / INDEX, lambda c: c["weight_map"].popitem()), {16: {"index"}}),
}  # fmt: skip


@pytest.mark.parametrize("what", SHARD_DAMAGE)
def test_damage_between_shards_is_found_at_its_step_alone(what: str, runs: Runs, tmp_path: Path) -> None:
    damage, expected = SHARD_DAMAGE[what]
    folder = copy_as(runs.get() / "sharded", tmp_path / "trajectory", "pythia")
    damage(folder, runs.get(seed=1) / "sharded")
    found = audit(index_trajectory(folder))
    assert {step: kinds & expected.get(step, kinds) for step, kinds in bad_kinds(found).items()} == expected


def test_damage_after_the_index_is_found(runs: Runs, tmp_path: Path) -> None:
    folder = copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia")
    manifest = index_trajectory(folder)
    truncate(first_shard(folder / "step4"))
    first_shard(folder / "step8").unlink()
    (folder / "step16" / "config.json").unlink()
    found = bad_kinds(audit(manifest))
    assert found.keys() == {4, 8, 16}
    assert ("truncated" in found[4], "missing" in found[8], found[16]) == (True, True, {"missing"})


@pytest.mark.parametrize("full", [False, True])
def test_shard_cut_in_half_after_the_index_is_one_bad_step_of_a_whole_audit(
    full: bool, runs: Runs, tmp_path: Path
) -> None:
    """Its header is whole, the values to look at are gone."""
    folder = copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia")
    manifest = index_trajectory(folder)
    shard = first_shard(folder / "step8")
    os.truncate(shard, shard.stat().st_size // 2)
    assert bad_kinds(audit(manifest, full=full)) == {8: {"truncated"}}


def test_tokenizer_that_changed_after_the_audit_is_found(runs: Runs, tmp_path: Path) -> None:
    folder = copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia")
    manifest = index_trajectory(folder)
    store_audit(manifest.store, audit(manifest))
    path = folder / "step16" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(BadTrajectory, match="step 16: its tokenizer"):
        refuse_bad_steps(index_trajectory(folder), [16])


def test_flipped_bit_between_the_samples_is_found_by_reading_all(runs: Runs, tmp_path: Path) -> None:
    folder = copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia")
    manifest = index_trajectory(folder)
    path = first_shard(folder / "step16")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert audit(manifest).bad == {}
    assert bad_kinds(audit(manifest, full=True)) == {16: {"hash"}}


def test_pickled_weights_are_refused_unless_asked_for_and_never_read(runs: Runs, tmp_path: Path) -> None:
    folder = copy_as(runs.get() / "sharded", tmp_path / "trajectory", "pythia")
    for step in (4, 16):
        pickle_weights(folder / f"step{step}")
    with pytest.raises(
        BadTrajectory, match=r"steps \[4, 16\] have only pickled weights .*--allow-bin takes them"
    ):
        index_trajectory(folder)
    found = audit(index_trajectory(folder, allow_bin=True))
    assert bad_kinds(found) == {4: {"bin"}, 16: {"bin"}}


# ------------------------------------------------------------------------------------------------ its use


def test_trusted_steps_may_teach_and_stay_marked(runs: Runs, tmp_path: Path) -> None:
    folder = copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia")
    replace_weights(folder / "step32", folder / "step40")
    manifest = index_trajectory(folder)
    found = audit(manifest, trusted=[40])
    store_audit(manifest.store, found)
    assert found.steps[40].verdict == "trusted"
    assert found.steps[40].reason == "holds the same weights as step 32"
    refuse_bad_steps(manifest, [24, 40])
    with pytest.raises(BadTrajectory, match=r"step 32: .*; the nearest good steps are \[24, 40\]"):
        refuse_bad_steps(manifest, [32])


def test_audit_of_other_weights_does_not_hold(
    runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia")
    first_value(16, float("nan"))(folder, folder)
    manifest = index_trajectory(folder)
    store_audit(manifest.store, audit(manifest))
    with pytest.raises(BadTrajectory, match="not finite"):
        refuse_bad_steps(manifest, [16])
    first_value(16, 0.0)(folder, folder)
    refuse_bad_steps(index_trajectory(folder), [16])
    assert f"the audit of {folder} is older than its step 16: audit it again" in caplog.messages


def test_audit_that_can_not_be_read_stops_training(runs: Runs, tmp_path: Path) -> None:
    manifest = index_trajectory(copy_as(runs.get() / "whole", tmp_path / "trajectory", "pythia"))
    (tmp_path / "trajectory" / "audit.json").write_text('{"schema": 1}')
    with pytest.raises(BadTrajectory, match="audit.json is no audit"):
        refuse_bad_steps(manifest, [16])


def test_same_verdicts_over_object_storage_from_a_small_part_of_the_bytes(
    bucket: str, runs: Runs, tmp_path: Path
) -> None:
    folder = copy_as(runs.get() / "sharded", tmp_path / "trajectory", "pythia")
    shard_of(16, 56)(folder, folder)
    replace_weights(folder / "step4", folder / "step40")
    first_value(24, float("nan"))(folder, folder)
    truncate(first_shard(folder / "step48"))
    here = audit(index_trajectory(folder))
    store = open_store(bucket)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent != folder):
        store.upload(path, path.relative_to(folder).as_posix())
    manifest = index_trajectory(bucket)
    assert {
        size for size, sha in manifest.checkpoints[8].files.values() if sha is None
    }  # weights are not read
    there = audit(manifest)
    assert (
        bad_kinds(there)
        == bad_kinds(here)
        == {4: {"duplicate"}, 16: {"mixed"}, 24: {"nonfinite"}, 48: {"truncated"}}
    )
    store_audit(manifest.store, there)
    assert read_audit(load_manifest(bucket).store) == there


def test_student_of_a_bad_step_is_refused_and_told_the_nearest_good_ones(
    teacher_run: Path, shards: Path, tmp_path: Path
) -> None:
    """The whole way: index, audit, train, as commands."""
    folder = Path(shutil.copytree(teacher_run / "trajectory", tmp_path / "trajectory"))
    for path in shards_of(folder / "step_00000008"):
        rewrite(path, lambda t: {n: v * 3 + 1 if v.is_floating_point() else v for n, v in t.items()})
    assert distill(["trajectory", "index", str(folder)], tmp_path).code == 0
    ended = distill(["trajectory", "audit", str(folder), "--json", str(tmp_path / "audit.json")], tmp_path)
    assert ended.code == 1, ended.output
    assert "   8  bad      does not fit its neighbours" in ended.output
    assert "4 of 5 steps are good; headers and samples read" in ended.output
    assert json.loads((tmp_path / "audit.json").read_text())["steps"]["8"]["verdict"] == "bad"
    changes = {"teacher__trajectory": str(folder), "schedule__kind": "equal"}
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert ended.code == 2
    assert "step 8: does not fit its neighbours" in ended.output
    assert "the nearest good steps are [4, 16]" in ended.output
    changes["schedule__checkpoints"] = [4, 16]  # type: ignore[assignment]
    distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path).ok()
