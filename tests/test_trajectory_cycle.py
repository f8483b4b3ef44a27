"""A trajectory's life by the commands alone, from a teacher's run to a student's, over a server that dies on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from storage import BUCKET, Seaweed
from test_growing import wait_until
from test_stream import student
from tiny import Ended, Started, assert_same_run

STEPS = "[2, 4, 8, 16, 24]"


def run(arguments: list[str], folder: Path, seaweed: Seaweed) -> Ended:
    output = folder / f"{arguments[0]}-{len(list(folder.iterdir()))}.txt"
    return Started(arguments, output, seaweed.environ).wait()


def test_published_trajectory_is_indexed_judged_drawn_and_pulled_by_command(
    teacher_run: Path, seaweed: Seaweed, bucket: str, tmp_path: Path
) -> None:
    def trajectory(*arguments: object) -> Ended:
        return run(["trajectory", *map(str, arguments)], tmp_path, seaweed)

    own = teacher_run / "trajectory"
    assert f"{bucket}: 5 checkpoints, steps {STEPS}" in trajectory("publish", own, "--to", bucket).ok().output
    assert "no difference" in trajectory("diff", own, bucket).ok().output
    assert f"5 checkpoints, steps {STEPS}" in trajectory("index", bucket, "--full").ok().output
    trajectory("audit", bucket).ok()
    drawn = trajectory("ls", bucket).ok().output.splitlines()
    assert [line.split()[0] for line in drawn if line.endswith("ok")] == ["2", "4", "8", "16", "24"]
    pulled = tmp_path / "pulled"
    trajectory("pull", bucket, "--to", pulled, "--steps", "4,24").ok()
    for step in (4, 24):
        name = f"step_{step:08d}/model.safetensors"
        assert (pulled / name).read_bytes() == (own / name).read_bytes()


@pytest.mark.parametrize(
    "comes_back", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["comes back", "stays away"]
)
def test_student_whose_storage_dies_between_two_teachers(
    comes_back: bool, teacher_run: Path, shards: Path, own_seaweed: Seaweed, tmp_path: Path
) -> None:
    """Waits for it, or ends in a sentence and goes on when called again: the run that nothing happened to, to the bit."""
    own, bucket = teacher_run / "trajectory", f"s3://{BUCKET}/cycle"
    run(["trajectory", "publish", str(own), "--to", bucket], tmp_path, own_seaweed).ok()
    run(["train", *student(shards, tmp_path / "calm", own)], tmp_path, own_seaweed).ok()
    arguments = ["train", *student(shards, tmp_path / "run", bucket, teacher__cache=str(tmp_path / "disk"))]
    output = tmp_path / "student.txt"
    started = Started(arguments, output, own_seaweed.environ)
    wait_until(lambda: "MB fetched" in output.read_text(), started)
    own_seaweed.kill()
    if comes_back:
        wait_until(lambda: "trying again" in output.read_text(), started)
        own_seaweed.start()
        started.wait().ok()
    else:
        ended = started.wait()
        assert ended.code != 0
        assert "can't be reached" in ended.output.splitlines()[-1], ended.output
        own_seaweed.start()
        run(arguments, tmp_path, own_seaweed).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")
