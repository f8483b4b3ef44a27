"""`distill probe`: from a trajectory to table, JSON, picture and schedule; what is done is kept, bad questions are told."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_probes import CHANCE, LOSSES, STEPS, TOP1, rows_of
from tiny import Ended

from distill.__main__ import main
from distill.probes.trajectory import write_suggestion
from distill.trajectory.publish import publish

FEW = ("--ngrams", "2", "3", "--sequences", "8", "--places", "2")


Ask = Callable[..., Ended]


@pytest.fixture
def probe(shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """`distill probe` with few questions, in this process; settings come before options."""

    def asked(trajectory: Path | str, out: Path, *more: str) -> Ended:
        settings = [f"data.shards={shards}", *(word for word in more if "=" in word)]
        options = [*FEW, "--out", str(out), *(word for word in more if "=" not in word)]
        monkeypatch.setattr(sys, "argv", ["distill", "probe", str(trajectory), *settings, *options])
        code = main()
        return Ended(code, "".join(capsys.readouterr()))

    return asked


def test_a_trajectory_is_probed_into_table_json_and_picture_and_its_losses_are_those_of_its_run(
    teacher_run: Path, probe: Ask, tmp_path: Path
) -> None:
    trajectory, out = teacher_run / "trajectory", tmp_path / "out"
    shown = probe(trajectory, out, "log.eval_samples=16").ok().output
    found = json.loads((out / "probe.json").read_text())
    assert [row["step"] for row in found["checkpoints"]] == [2, 4, 8, 16, 24]
    manifest = json.loads((trajectory / "manifest.json").read_text())
    recorded = {c["step"]: c["validation_loss"] for c in manifest["checkpoints"]}
    assert {r["step"]: r["loss"] for r in found["checkpoints"]} == pytest.approx(recorded, rel=1e-5)
    assert "| step | loss | top-1 | Brier | ECE | M_robust(2) | M_close(2) |" in shown
    assert "| step | rank 1-10 | rank 11-100 | rank 101-128 |" in shown
    assert (out / "probe.png").stat().st_size > 10_000


def test_what_is_probed_is_kept_and_other_questions_are_refused(
    teacher_run: Path, probe: Ask, tmp_path: Path
) -> None:
    trajectory, out = teacher_run / "trajectory", tmp_path / "out"
    probe(trajectory, out, "--steps", "8").ok()
    content = json.loads((out / "probe.json").read_text())
    content["checkpoints"][0]["loss"] = 123.0  # so that we see whether it is asked again
    (out / "probe.json").write_text(json.dumps(content))
    again = probe(trajectory, out, "--steps", "8", "16").ok()
    assert "| 8 | 123.0000 |" in again.output and "| 16 |" in again.output
    assert probe(trajectory, out, "--steps", "8", "16").ok().output == again.output  # nothing is left to do
    content["checkpoints"][0]["weights"] = ["of another run"]
    (out / "probe.json").write_text(json.dumps(content))
    assert "123.0000" not in probe(trajectory, out, "--steps", "8").ok().output
    other = probe(trajectory, out, "data.mask_rate=0.3")
    assert other.code == 2 and "its mask_rate is 0.15, now 0.3" in other.output


@pytest.mark.parametrize("at", ["in object storage", "indexed from elsewhere"])
def test_a_trajectory_that_lies_elsewhere_gets_the_figures_of_its_folder(
    at: str, teacher_run: Path, bucket: str, probe: Ask, tmp_path: Path
) -> None:
    own = teacher_run / "trajectory"
    publish(own, bucket)
    where: Path | str = bucket
    if at == "indexed from elsewhere":
        where = tmp_path / "index"
        where.mkdir()
        manifest = json.loads((own / "manifest.json").read_text())
        for checkpoint in manifest["checkpoints"]:
            checkpoint["location"] = f"{bucket}/{checkpoint['location']}"
        (where / "manifest.json").write_text(json.dumps(manifest))
    few, cache = ("--steps", "8", "24", "log.eval_samples=16"), tmp_path / "cache"
    here = probe(own, tmp_path / "here", *few).ok().output
    assert probe(where, tmp_path / "there", *few, f"teacher.cache={cache}").ok().output == here
    assert len(list(cache.rglob("model.safetensors"))) == 2
    one, other = (json.loads((tmp_path / out / "probe.json").read_text()) for out in ("here", "there"))
    assert one["checkpoints"] == other["checkpoints"] and other["questions"]["trajectory"] == str(where)
    assert (tmp_path / "there" / "probe.png").stat().st_size > 10_000


def test_a_trajectory_that_has_not_learned_gets_no_schedule(
    teacher_run: Path, probe: Ask, tmp_path: Path
) -> None:
    ended = probe(teacher_run / "trajectory", tmp_path / "out", "--suggest-schedule")
    assert ended.code == 2 and "this teacher has not learned yet" in ended.output
    assert "| 24 |" in ended.output and not (tmp_path / "out" / "schedule.yaml").exists()


def as_probed(trajectory: Path, out: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What `probe` would have found, with other losses: all that `write_suggestion` reads."""
    drawn = {f"{kind}_3": [0.0, 0.1, 0.2] for kind in ("robust", "close")} | {"brier": 0.5, "ece": 0.1}
    out.mkdir()
    asked = {"questions": {"trajectory": str(trajectory)}, "chance": CHANCE}
    return {**asked, "checkpoints": [drawn | row for row in rows], **more}


def test_a_schedule_from_some_steps_names_the_last_of_the_trajectory(tmp_path: Path) -> None:
    rows, out = rows_of(STEPS[:8], LOSSES[:8], TOP1[:8]), tmp_path / "out"
    write_suggestion(as_probed(tmp_path, out, rows, last_step=2000, complete=True), (3,), out)
    assert "checkpoints:\n  - 800\n  - 2000\n" in (out / "schedule.yaml").read_text()


def test_a_trajectory_that_still_grows_is_probed_but_gets_no_schedule(
    teacher_run: Path, probe: Ask, tmp_path: Path
) -> None:
    growing = tmp_path / "trajectory"
    shutil.copytree(teacher_run / "trajectory", growing)
    manifest = json.loads((growing / "manifest.json").read_text())
    (growing / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    ended = probe(growing, tmp_path / "out", "--steps", "2", "4", "--suggest-schedule")
    assert (
        ended.code == 2 and "run has not ended, its newest checkpoint is step 24: let it end" in ended.output
    )
    assert "| 4 |" in ended.output and not (tmp_path / "out" / "schedule.yaml").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "3"), "has no teacher step 3; it has [2, 4, 8, 16, 24]"),
        (("data.task=clm",), "holds a bert, a model for mlm, not for clm"),
        (("--ngrams", "1"), "--ngrams [1]: numbers of 2 or more expected"),
        (("--places", "0"), "must be at least 1, got 8 and 0"),
    ],
)
def test_bad_questions_are_told_what_to_change(
    more: tuple[str, ...], message: str, teacher_run: Path, probe: Ask, tmp_path: Path
) -> None:
    ended = probe(teacher_run / "trajectory", tmp_path / "out", *more)
    assert ended.code == 2 and message in ended.output


def test_an_empty_trajectory_and_one_of_another_tokenizer_are_refused(
    teacher_run: Path, probe: Ask, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    manifest = json.loads((teacher_run / "trajectory" / "manifest.json").read_text())
    (empty / "manifest.json").write_text(json.dumps({**manifest, "checkpoints": []}))
    ended = probe(empty, tmp_path / "out")
    assert ended.code == 2 and "has no checkpoint after step 0" in ended.output
    (empty / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "6" * 64}))
    ended = probe(empty, tmp_path / "out")
    assert ended.code == 2 and "the teacher was trained with tokenizer 666666666666" in ended.output
