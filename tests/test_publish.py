"""A trajectory on its way to a store: whole checkpoints, their entries last, nothing lost and nothing replaced."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from storage import Seaweed
from tiny import TOKENIZER, VOCABULARY, Kill, Started, config, rows, settings
from transformers import BertConfig

from distill.build import own_trajectory
from distill.distributed import World
from distill.schedule import in_loss_drop
from distill.trajectory import publish as publish_module
from distill.trajectory.index import index_trajectory
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, load_manifest
from distill.trajectory.publish import JOURNAL, Published, Publisher, publish
from distill.trajectory.store import Remote, StoreError, open_store

TEACHER = {"steps": 24, "seed": 1, "save__trajectory_every": 8, "save__trajectory_first": 2}


def described(manifest: Manifest) -> dict[int, Any]:
    """What the entries say, whereever the files lie."""
    return {s: (c.files, c.tokens, c.validation_loss) for s, c in manifest.checkpoints.items()}


def assert_published(url: str, teacher_run: Path) -> None:
    """The store holds what the run without a store left in its folder, every byte."""
    there, local = load_manifest(url), load_manifest(teacher_run / "trajectory")
    assert described(there) == described(local)
    assert there.complete
    for step, checkpoint in there.checkpoints.items():
        store, folder = there.files_of(step), teacher_run / "trajectory" / f"step_{step:08d}"
        for name in checkpoint.files:
            assert store.read(name) == (folder / name).read_bytes()


@pytest.fixture
def trajectory(teacher_run: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(teacher_run / "trajectory", tmp_path / "trajectory"))


# ------------------------------------------------------------------------------------------------ of a folder


def test_folder_is_sent_whole_and_again_sends_only_what_is_new(
    teacher_run: Path, trajectory: Path, bucket: str
) -> None:
    manifest = load_manifest(trajectory)
    late = manifest.checkpoints.pop(24)
    manifest.complete = False
    manifest.write()
    assert list(publish(trajectory, bucket).checkpoints) == [2, 4, 8, 16]
    before = {o.path: o.etag for o in open_store(bucket).objects()}
    manifest.complete = True
    manifest.add(late)
    publish(trajectory, bucket)
    assert_published(bucket, teacher_run)
    after = {o.path: o.etag for o in open_store(bucket).objects()}
    assert {p for p in after if after[p] != before.get(p)} == {
        "manifest.json",
        *(f"step_00000024/{name}" for name in late.files),
    }


def test_place_of_another_trajectory_is_refused(trajectory: Path, bucket: str) -> None:
    publish(trajectory, bucket)
    config = trajectory / "step_00000008" / "config.json"
    config.write_text(config.read_text() + "\n")
    index_trajectory(trajectory)
    with pytest.raises(
        BadTrajectory, match=r"holds the trajectory of another run \(its step 8 is not of this one\)"
    ):
        publish(trajectory, bucket)


def test_files_that_lie_elsewhere_are_to_be_pulled_first(
    trajectory: Path, bucket: str, tmp_path: Path
) -> None:
    index_trajectory(trajectory, tmp_path / "index")
    with pytest.raises(BadTrajectory, match=r"files of steps \[2, 4, 8, 16, 24\] lie elsewhere: .* pull"):
        publish(tmp_path / "index", bucket)


def test_upload_that_was_cut_off_goes_on_with_the_next_file(
    trajectory: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, store = load_manifest(trajectory), open_store(bucket)
    there = Published(own, store)
    checkpoint, sent = own.checkpoints[8], []
    source, journal = trajectory / checkpoint.location, tmp_path / "journal"
    plain = type(store).upload

    def upload(self: Any, local: Path, path: str) -> None:
        if local.name == "model.safetensors" and len(sent) < len(checkpoint.files):
            raise StoreError(path, "can't be reached", "unreachable")
        sent.append(local.name)
        plain(self, local, path)

    monkeypatch.setattr(type(store), "upload", upload)
    with pytest.raises(StoreError):
        publish_module.upload(there, checkpoint, source, journal)
    assert 0 < len(sent) < len(checkpoint.files)
    assert 8 not in there.manifest.checkpoints
    monkeypatch.setattr(
        type(store), "upload", lambda s, local, path: (sent.append(local.name), plain(s, local, path))
    )
    publish_module.upload(there, checkpoint, source, journal)
    assert sorted(sent) == sorted(checkpoint.files)
    assert list(load_manifest(bucket).checkpoints) == [8]


def test_command_that_was_cut_off_sends_again_only_what_has_not_arrived_or_changed_since(
    trajectory: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(trajectory)
    manifest.checkpoints = {8: manifest.checkpoints[8]}
    manifest.write()
    sent, plain = [], Remote.upload

    def upload(self: Remote, local: Path, path: str, fails: bool = True) -> None:
        if fails and local.name == "tokenizer.json":
            raise StoreError(path, "can't be reached", "unreachable")
        sent.append(local.name)
        plain(self, local, path)

    monkeypatch.setattr(Remote, "upload", upload)
    with pytest.raises(StoreError):
        publish(trajectory, bucket)
    assert {"config.json", "model.safetensors"} <= set(sent)
    config = trajectory / "step_00000008" / "config.json"
    config.write_text(config.read_text() + "\n")
    index_trajectory(trajectory)
    sent.clear()
    monkeypatch.setattr(Remote, "upload", functools.partialmethod(upload, fails=False))
    manifest = load_manifest(trajectory)
    manifest.checkpoints = {8: manifest.checkpoints[8]}
    manifest.write()
    there = publish(trajectory, bucket)
    assert {"config.json", "tokenizer.json"} <= set(sent)
    assert "model.safetensors" not in sent
    assert there.files_of(8).read("config.json") == config.read_bytes()
    assert not [p for p in trajectory.iterdir() if p.name.startswith(".")]


def test_folder_is_copied_to_a_folder_and_stays(trajectory: Path, teacher_run: Path, tmp_path: Path) -> None:
    publish(trajectory, str(tmp_path / "copy"))
    publish(trajectory, (tmp_path / "copy").as_uri())
    publish(trajectory, str(trajectory))
    for place in (tmp_path / "copy", trajectory):
        assert_published(str(place), teacher_run)


def test_one_who_sends_where_somebody_else_does_is_stopped_and_takes_nothing_away(
    trajectory: Path, bucket: str
) -> None:
    own, store = load_manifest(trajectory), open_store(bucket)
    first, second = Published(own, store), Published(own, store)
    send(first, own, 8)
    for step in (8, 16):
        with pytest.raises(StoreError, match=f"{bucket}/manifest.json was changed by somebody else"):
            send(second, own, step)
    send(first, own, 4)
    assert list(load_manifest(bucket).checkpoints) == [4, 8]
    third = Published(own, store)
    send(first, own, 2)
    with pytest.raises(StoreError, match="was changed by somebody else"):
        third.mark_complete()
    assert not load_manifest(bucket).complete


def send(there: Published, own: Manifest, step: int) -> None:
    publish_module.upload(there, own.checkpoints[step], Path(own.url) / own.checkpoints[step].location)


def test_entry_is_not_written_where_somebody_else_replaced_a_file(
    trajectory: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Remote.upload

    def upload(self: Remote, local: Path, path: str) -> None:
        plain(self, local, path)
        if path == "model.safetensors":
            self.write("config.json", b"another run's")

    monkeypatch.setattr(Remote, "upload", upload)
    with pytest.raises(StoreError, match=r"step_00000002/config.json was replaced by somebody else"):
        publish(trajectory, bucket)
    assert [o.path for o in open_store(bucket).objects() if "step_" not in o.path] == []


def test_entry_whose_answer_was_lost_is_found_again(
    trajectory: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = load_manifest(trajectory)
    there, plain = Published(own, open_store(bucket)), Remote.create

    def create(self: Remote, path: str, data: bytes) -> bool:
        plain(self, path, data)
        raise StoreError(path, "can't be reached", "unreachable")

    monkeypatch.setattr(Remote, "create", create)
    with pytest.raises(StoreError, match="can't be reached"):
        send(there, own, 8)
    for step in (8, 16):
        send(there, own, step)
    assert list(load_manifest(bucket).checkpoints) == [8, 16]


# ------------------------------------------------------------------------------------------------ of a run


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("to", ["{}/there", "file://{}/there", "s3:bucket", "https://server{}", "hf://a/b"])
def test_run_is_sent_to_object_storage_only_which_all_ranks_say_alike(
    to: str, rank: int, shards: Path, tmp_path: Path
) -> None:
    """A folder has no use for it, and once both copies of a checkpoint were removed."""
    to = to.format(tmp_path)
    settled = config(shards, tmp_path / "run", save__trajectory_every=8, save__trajectory_to=to)
    world, model = World(rank, 2, rank, torch.device("cpu")), BertConfig(vocab_size=VOCABULARY)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"save.trajectory_to .* got '.*': give s3://.* leave it out"):
        own_trajectory(settled, world, tmp_path / "run", model, TOKENIZER)


@pytest.fixture
def own(trajectory: Path) -> tuple[Manifest, dict[int, Checkpoint]]:
    """The manifest of a run that has left nothing yet, and what it will leave."""
    manifest = load_manifest(trajectory)
    checkpoints, manifest.checkpoints, manifest.complete = manifest.checkpoints, {}, False
    return manifest, checkpoints


@pytest.mark.parametrize("location", ["", ".", "..", "{}/elsewhere", "../elsewhere", "inside/step"])
def test_nothing_outside_its_own_folder_is_sent_or_removed(
    location: str, own: Any, bucket: str, trajectory: Path, tmp_path: Path
) -> None:
    manifest, checkpoints = own
    for place in ("elsewhere", "trajectory/inside/step"):
        shutil.copytree(trajectory / "step_00000008", tmp_path / place)
    shutil.copytree(trajectory / "step_00000008", trajectory, dirs_exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    publisher = Publisher(manifest, open_store(bucket))
    publisher.add(dataclasses.replace(checkpoints[8], location=location.format(tmp_path)))
    with pytest.raises(BadTrajectory, match="is no folder right in"):
        publisher.complete()
    assert sorted(tmp_path.rglob("*")) == before


def test_run_that_comes_second_keeps_its_checkpoints(
    own: Any, bucket: str, trajectory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, checkpoints = own
    whole = dataclasses.replace(manifest, checkpoints=checkpoints)
    publisher = Publisher(manifest, open_store(bucket))
    send(Published(whole, open_store(bucket)), whole, 4)
    publisher.add(checkpoints[8])
    with pytest.raises(StoreError, match=f"{bucket}/manifest.json was changed by somebody else"):
        publisher.complete()
    assert (trajectory / "step_00000008" / "model.safetensors").exists()
    assert publisher.pending() == [checkpoints[8]]
    assert list(load_manifest(bucket).checkpoints) == [4]


def test_checkpoint_whose_entry_could_not_be_written_stays(
    own: Any, bucket: str, trajectory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, checkpoints = own

    def refuse(self: Remote, path: str, *_: Any) -> bool:
        raise StoreError(path, "can't be reached", "unreachable")

    publisher = Publisher(manifest, open_store(bucket))
    with monkeypatch.context() as patched:
        for name in ("write", "create", "replace"):
            patched.setattr(Remote, name, refuse)
        publisher.add(checkpoints[8])
        with pytest.raises(StoreError, match="can't be reached"):
            publisher.complete()
        with pytest.raises(StoreError, match="can't be reached"):
            publisher.complete()
    assert (trajectory / "step_00000008" / "model.safetensors").exists()
    Publisher(manifest, open_store(bucket)).complete()
    assert not (trajectory / "step_00000008").exists()
    assert list(load_manifest(bucket).checkpoints) == [8]


def test_files_of_an_entry_that_the_store_has_lost_stay(own: Any, bucket: str, trajectory: Path) -> None:
    """The run was killed when the entry was in both manifests, and before the files were removed."""
    manifest, checkpoints = own
    for step in (4, 8):
        there = f"{bucket}/{checkpoints[step].location}"
        manifest.add(dataclasses.replace(checkpoints[step], location=there))
    whole = dataclasses.replace(manifest, checkpoints=checkpoints)
    send(Published(whole, open_store(bucket)), whole, 4)
    Publisher(manifest, open_store(bucket)).close()
    assert not (trajectory / "step_00000004").exists()
    assert (trajectory / "step_00000008").exists()


@pytest.mark.parametrize("journal", [b"{", b"[1]", b"\xff", b'{"config.json": "etag"}'])
def test_journal_that_says_nothing_is_passed_over(
    journal: bytes, own: Any, bucket: str, trajectory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, checkpoints = own
    (trajectory / checkpoints[8].location / JOURNAL).write_bytes(journal)
    publisher = Publisher(manifest, open_store(bucket))
    publisher.add(checkpoints[8])
    until = time.monotonic() + 30
    while publisher.pending() and time.monotonic() < until:
        time.sleep(0.05)
    assert not publisher.pending()
    publisher.close()
    assert ("can't be read" in caplog.text) == (journal[:2] != b'{"')
    assert list(load_manifest(bucket).checkpoints) == [8]


def teach(arguments: list[str], folder: Path, seaweed: Seaweed, name: str, kill: Kill | None = None) -> Any:
    return Started(["train", *arguments], folder / name, seaweed.environ, kill).wait()


@pytest.mark.parametrize("call", [2, 9])
def test_run_that_was_killed_while_it_sent_goes_on_to_the_same_trajectory(
    call: int, shards: Path, teacher_run: Path, seaweed: Seaweed, bucket: str, tmp_path: Path
) -> None:
    """The second and the ninth of the files: within the first and the second checkpoint."""
    arguments = settings(shards, tmp_path / "run", **TEACHER, save__trajectory_to=bucket)
    kill = Kill("distill.trajectory.store:Remote.upload", call, before=False)
    assert teach(arguments, tmp_path, seaweed, "killed", kill).code == -9
    teach(arguments, tmp_path, seaweed, "went-on").ok()
    assert_published(bucket, teacher_run)
    own = tmp_path / "run" / "trajectory"
    assert [p.name for p in own.iterdir() if p.is_dir()] == []  # all has arrived
    assert described(load_manifest(own)) == described(load_manifest(bucket))
    assert load_manifest(own).checkpoints[8].location == f"{bucket}/step_00000008"


def test_run_whose_storage_is_away_trains_on_and_says_at_the_end_what_waits(
    shards: Path, teacher_run: Path, seaweed: Seaweed, bucket: str, tmp_path: Path
) -> None:
    arguments = settings(shards, tmp_path / "run", **TEACHER, save__trajectory_to=bucket)
    refused = Refused()
    ended = Started(["train", *arguments], tmp_path / "away", seaweed.environ, refused).wait()  # type: ignore[arg-type]
    assert ended.code == 2
    assert "a checkpoint waits in" in ended.output
    assert "may not" in ended.output.splitlines()[-1]
    assert rows(tmp_path / "run", "train")[-1]["step"] == 24
    teach(arguments, tmp_path, seaweed, "went-on").ok()
    assert_published(bucket, teacher_run)


class Refused:
    """Uploads are refused from the start."""

    def arm(self) -> None:
        from distill.trajectory.store import Remote

        def upload(self: Remote, local: Path, path: str) -> None:
            raise StoreError(f"{self.url}/{path}", "may not be written: ask for it", "denied")

        Remote.upload = upload  # type: ignore[method-assign]


def test_checkpoint_that_is_published_stays_when_the_run_comes_to_it_again(
    shards: Path, teacher_run: Path, seaweed: Seaweed, bucket: str, tmp_path: Path
) -> None:
    """Killed after step 8 was left, before it was saved: it is trained again from step 5."""
    arguments = settings(shards, tmp_path / "run", **TEACHER, save__trajectory_to=bucket)
    kill = Kill("distill.engine:Engine.step", 10)
    assert teach(arguments, tmp_path, seaweed, "killed", kill).code == -9
    before = {o.path: o.etag for o in open_store(bucket).objects() if "step_" in o.path}
    teach(arguments, tmp_path, seaweed, "went-on").ok()
    after = {o.path: o.etag for o in open_store(bucket).objects()}
    assert before.items() <= after.items()
    assert_published(bucket, teacher_run)


# ------------------------------------------------------------------------------------------------ save rule


@pytest.mark.parametrize(
    ("left", "is_in_it"),
    [
        ([], False),
        ([[8, 5.0]], False),
        ([[8, 5.0], [16, 4.4]], True),  # 0.6 nats a doubling
        ([[8, 5.0], [16, 4.6]], False),
        ([[16, 4.4], [20, 4.2]], True),  # 0.2 nats in a third of a doubling
        ([[16, 4.4], [64, 3.5]], False),
        ([[16, 4.4], [20, 5.0]], False),
    ],
)
def test_loss_drop_is_told_by_nats_per_doubling_between_the_last_two(
    left: list[list[float]], is_in_it: bool
) -> None:
    assert in_loss_drop(left, 0.5) is is_in_it


def test_trajectory_is_denser_inside_the_loss_drop_also_when_the_run_goes_on(
    shards: Path, tmp_path: Path
) -> None:
    keys = {"steps": 40, "save__trajectory_every": 20, "save__trajectory_first": 5, "save__every": 7}
    dense = {
        "save__trajectory_drop_every": 2,
        "optim__lr": 1e-2,
        "data__task": "clm",
    }
    arguments = {name: settings(shards, tmp_path / name, **keys, **dense) for name in ("whole", "killed")}
    Started(["train", *arguments["whole"]], tmp_path / "output").wait().ok()
    kill = Kill("distill.engine:Engine.step", 18)
    assert Started(["train", *arguments["killed"]], tmp_path / "output1", kill=kill).wait().code == -9
    Started(["train", *arguments["killed"]], tmp_path / "output2").wait().ok()
    manifests = {name: load_manifest(tmp_path / name / "trajectory") for name in arguments}
    assert described(manifests["whole"]) == described(manifests["killed"])
    steps, losses = list(manifests["whole"].checkpoints), manifests["whole"].losses
    assert {5, 10, 20, 40} < set(steps) < {5, *range(10, 39, 2), 40}  # it begins and ends within the run
    for step in sorted(set(steps) - {5, 10, 20, 40}):
        earlier = [[s, losses[s]] for s in steps if s < step]
        assert step % 2 == 0 and in_loss_drop(earlier)
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step_00000040" / "state.json").read_text())
    assert state["left"] == [[s, losses[s]] for s in steps[-2:]]
