"""Scored once and learned from: the live teacher's losses, whatever the layout; kills; what does not belong is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    TOKENIZER,
    Kill,
    Started,
    assert_same_run,
    config,
    distill,
    distill_on_ranks,
    ragged_text,
    rows,
    settings,
    write_text_shards,
)

from distill.config_reader import ConfigError
from distill.data import Samples
from distill.metrics import METRICS, read_rows
from distill.models import counted_rows
from distill.pretrained import load_model
from distill.run_folder import RunFolderError
from distill.score import codec_for, score, with_upcoming
from distill.targets.codecs import make_codec
from distill.targets.header import BadTargets, Range, load_header
from distill.targets.reader import TargetReader
from distill.targets.writer import finished
from distill.teacher import Teacher
from distill.train import train
from distill.trajectory.index import index_trajectory

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
STUDENT: dict[str, Any] = {
    "steps": 12,
    "schedule__kind": "explicit",
    "schedule__stages": [[0, 2], [4, 8], [9, 24]],
}
A_SHARD = 20  # of 96 samples in stages of 32, 40 and 24: 6 shards
HIDDEN = make_codec("hidden", 1.0)
Tars = dict[str, bytes]


def student(shards: Path, run_dir: Path, **changes: Any) -> Any:
    return config(shards, run_dir, **{**STUDENT, **changes})


def tars(folder: Path) -> Tars:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def trajectory(teacher_run: Path) -> str:
    return str(teacher_run / "trajectory")


@pytest.fixture(scope="module")
def hidden(shards: Path, trajectory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact targets of the STUDENT's 96 samples; never written to."""
    out = tmp_path_factory.mktemp("scored") / "hidden"
    score(student(shards, out, teacher__trajectory=trajectory), out, HIDDEN, a_shard=A_SHARD)
    return out


@pytest.fixture(scope="module")
def top_k(shards: Path, trajectory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cut to 16 classes; never written to."""
    out = tmp_path_factory.mktemp("scored") / "top_k"
    codec = make_codec("top_k", 1.0, k=16)
    score(student(shards, out, teacher__trajectory=trajectory), out, codec, a_shard=A_SHARD)
    return out


@pytest.fixture(scope="module")
def live(shards: Path, trajectory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that the live teacher taught."""
    run_dir = tmp_path_factory.mktemp("live") / "run"
    train(student(shards, run_dir, teacher__trajectory=trajectory))
    return run_dir


# ------------------------------------------------------------------------------------------------ the same losses


def test_run_on_exact_targets_is_the_live_teachers_to_the_bit(
    shards: Path, hidden: Path, live: Path, tmp_path: Path
) -> None:
    train(student(shards, tmp_path / "run", teacher__targets=str(hidden)))
    assert_same_run(tmp_path / "run", live)
    read = [row["storage_mb_per_node"] for row in read_rows(tmp_path / "run" / METRICS, "train")]
    assert sum(read) == pytest.approx(sum(len(tar) for tar in tars(hidden).values()) / 1e6)


@pytest.mark.parametrize(
    "keys",
    [
        {"data__task": "clm", "teacher__dtype": "bf16", "objective__weights": {"jsd": 1.0, "hard": 0.5}},
        {
            "data__isolate_documents": True,
            "objective__temperature": [[0, 2.0], [1, 1.0]],
            "objective__weights": {"reverse_kl": 1.0},
        },
        {"batch_size": 64, "data__num_workers": 2, "objective__weights": {"tvd": 1.0}},  # 768 samples of 600: a second epoch
    ],
    ids=["clm in bf16, JSD", "documents apart, reverse KL, falling temperature", "two epochs, readers, TVD"],
)  # fmt: skip
def test_exact_targets_serve_every_objective_task_and_epoch_to_the_bit(
    keys: dict[str, Any], shards: Path, trajectory: str, teacher_run: Path, tmp_path: Path
) -> None:
    if keys.get("data__task") == "clm":
        changes = {"data__task": "clm", "steps": 24, "save__trajectory_every": 8, "save__trajectory_first": 2}
        train(config(shards, tmp_path / "teacher", **changes))
        trajectory = str(tmp_path / "teacher" / "trajectory")
    asked = student(shards, tmp_path / "live", teacher__trajectory=trajectory, **keys)
    score(asked, tmp_path / "targets", HIDDEN)
    train(asked)
    train(student(shards, tmp_path / "run", teacher__targets=str(tmp_path / "targets"), **keys))
    assert_same_run(tmp_path / "run", tmp_path / "live")


def test_terms_that_read_hidden_states_learn_from_exact_targets_as_from_the_live_teacher(
    shards: Path, trajectory: str, hidden: Path, tmp_path: Path
) -> None:
    names = ("forward_kl", "cross_head", "ckd_hidden", "relations", "contrastive", "atkd", "ckd")
    changes = {"objective__weights": dict.fromkeys(names, 0.2), "log__every": 1}
    train(student(shards, tmp_path / "live", teacher__trajectory=trajectory, **changes))
    train(student(shards, tmp_path / "stored", teacher__targets=str(hidden), **changes))
    assert_same_run(tmp_path / "stored", tmp_path / "live")


def test_terms_that_read_classes_learn_from_cut_targets_and_the_others_are_refused(
    shards: Path, top_k: Path, hidden: Path, tmp_path: Path
) -> None:
    weights = {"forward_kl": 0.5, "atkd": 0.2, "ckd": 0.2}
    train(student(shards, tmp_path / "run", teacher__targets=str(top_k), objective__weights=weights))
    assert all(row["term_ckd"] > 0 for row in rows(tmp_path / "run", "train"))
    for targets, name in ((top_k, "cross_head"), (hidden, "hidden_square")):
        refused = student(
            shards,
            tmp_path / name,
            teacher__targets=str(targets),
            objective__weights={"forward_kl": 0.5, name: 0.5},
        )
        with pytest.raises(
            ValueError, match=f"weights.{name} needs more of the teacher .* its targets are stored"
        ):
            train(refused)


@pytest.mark.dist
def test_other_micro_batch_batch_and_ranks_read_the_same_targets(
    shards: Path, hidden: Path, trajectory: str, tmp_path: Path
) -> None:
    """6 steps of 16 in place of 12 of 8, on two ranks, in micro-batches of 2: stages at the same samples."""
    layout = {
        "steps": 6,
        "batch_size": 16,
        "micro_batch_size": 2,
        "log__every": 1,
        "schedule__stages": [[0, 2], [2, 8]],
    }
    stages = {"schedule__stages": [[0, 2], [4, 8]]}
    for name, source in {"live": {"teacher__trajectory": trajectory}, "run": {}}.items():
        if name == "run":
            scored = student(shards, tmp_path, teacher__trajectory=trajectory, **stages)
            score(scored, tmp_path / "targets", HIDDEN, a_shard=A_SHARD)
            source = {"teacher__targets": str(tmp_path / "targets")}
        arguments = ["train", *settings(shards, tmp_path / name, **{**STUDENT, **layout, **source})]
        for ended in distill_on_ranks(arguments, tmp_path, 2):
            ended.ok()
    found, expected = (rows(tmp_path / name, "train") for name in ("run", "live"))
    assert [row["teacher_step"] for row in found] == [2, 2, 8, 8, 8, 8]
    assert [row["soft"] for row in found] == pytest.approx([row["soft"] for row in expected], rel=1e-5)


def test_cut_targets_give_less_than_the_whole_divergence_and_train(
    shards: Path, top_k: Path, live: Path, tmp_path: Path
) -> None:
    """Merging classes into a bucket can only lower a KL divergence."""
    train(student(shards, tmp_path / "run", teacher__targets=str(top_k)))
    found, whole = (rows(folder, "train")[0]["soft"] for folder in (tmp_path / "run", live))
    assert 0 < found < whole


@pytest.mark.parametrize("name", ["sampled", "top_p"])
def test_every_codec_trains(name: str, shards: Path, trajectory: str, tmp_path: Path) -> None:
    objective = {"objective__weights": {"forward_kl": 1.0, "hard": 0.5}, "objective__temperature": 2.0}
    asked = student(shards, tmp_path, teacher__trajectory=trajectory, **objective)
    score(asked, tmp_path / "targets", codec_for(asked, name, None, None, None))
    train(student(shards, tmp_path / "run", teacher__targets=str(tmp_path / "targets"), **objective))
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert all(np.isfinite(losses))


# ------------------------------------------------------------------------------------------------ who scored what


def test_each_sample_is_scored_once_and_by_the_checkpoint_that_will_teach_it(
    shards: Path, hidden: Path, trajectory: str, tmp_path: Path
) -> None:
    asked = student(shards, tmp_path, teacher__trajectory=trajectory)
    samples, reader = Samples(asked.data, "train", asked.seed, shuffle=True), TargetReader(hidden)
    models = {
        step: load_model("mlm", Path(trajectory) / f"step_{step:08d}", torch.float32, 32).eval()
        for step in (2, 8, 24)
    }
    for position in range(96):
        batch = samples[np.array([position])]
        found = reader.read(np.array([position]), np.zeros(1, int), batch.sample_ids, [len(batch.rows_N)])
        with torch.no_grad():
            said = {s: counted_rows(m, batch.inputs, batch.rows_N).hidden_ND for s, m in models.items()}
        own = 2 if position < 32 else 8 if position < 72 else 24
        assert [s for s, h in said.items() if torch.allclose(found, h, atol=1e-5)] == (
            [own] if len(found) else [2, 8, 24]
        )
    assert sum(len(reader.header.range_of(first)) for first in finished(hidden)) == 96


def test_several_teachers_cost_the_passes_of_one(
    shards: Path, trajectory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences: list[int] = []
    plain = Teacher.rows
    monkeypatch.setattr(
        Teacher, "rows", lambda self, inputs, at: sequences.append(len(inputs[0])) or plain(self, inputs, at)
    )
    score(student(shards, tmp_path, teacher__trajectory=trajectory), tmp_path / "targets", HIDDEN)
    assert sum(sequences) == 96


def test_each_round_knows_the_steps_after_its_own_which_are_listed_once_a_stage() -> None:
    rounds = [[Range(first, first + 1, step)] for first, step in enumerate([2, 2, 8, 2, 2, 2])]
    found = list(with_upcoming(rounds))
    assert [places for places, _ in found] == rounds
    assert [ahead for _, ahead in found] == [[8, 2], [8, 2], [2], [], [], []]
    assert len({id(ahead) for _, ahead in found}) == 3  # not a list a round: that is quadratic in rounds


@pytest.mark.dist
@pytest.mark.parametrize("keys", [{}, {"teacher__zero_stage": 3}], ids=["whole", "ZeRO 3"])
def test_shards_do_not_depend_on_ranks_and_batch_size(
    keys: dict[str, Any], shards: Path, trajectory: str, top_k: Path, tmp_path: Path
) -> None:
    changes = {**STUDENT, "teacher__trajectory": trajectory, "micro_batch_size": 8, **keys}
    options = ["--codec", "top_k", "--k", "16", "--shard-samples", str(A_SHARD), "--out"]
    arguments = ["score", *settings(shards, tmp_path, **changes), *options, str(tmp_path / "two")]
    for ended in distill_on_ranks(arguments, tmp_path, 2):
        ended.ok()
    assert tars(tmp_path / "two") == tars(top_k)


# ------------------------------------------------------------------------------------------------ kills and jobs


def score_command(shards: Path, trajectory: str, out: Path, *options: str, **changes: Any) -> list[str]:
    keys = {**STUDENT, "teacher__trajectory": trajectory, **changes}
    codec = ["--codec", "top_k", "--k", "16", "--shard-samples", str(A_SHARD)]
    return ["score", *settings(shards, out, **keys), *codec, *options, "--out", str(out)]


@pytest.mark.parametrize(
    "kill",
    [
        Kill("distill.targets.writer:write_shard", 3),
        Kill("distill.targets.writer:write_shard", 3, before=False),
        Kill("distill.targets.writer:Journal.add", 2),
        Kill("distill.targets.writer:Journal.add", 2, before=False),
        Kill("os:replace", 4),  # three shards are in place, the header before them
    ],
    ids=["before a shard", "after a shard", "before its line", "after its line", "before it has its name"],
)
def test_killed_scoring_goes_on_to_the_same_bytes(
    kill: Kill, shards: Path, trajectory: str, top_k: Path, tmp_path: Path
) -> None:
    arguments = score_command(shards, trajectory, tmp_path / "targets")
    assert distill(arguments, tmp_path, kill).code == -signal.SIGKILL
    before = finished(tmp_path / "targets")
    assert 0 < len(before) < 6
    told = json.loads(distill(arguments, tmp_path).ok().output.splitlines()[-1])
    assert (told["shards"], told["missing"], told["samples"]) == (6, 0, 96)
    assert tars(tmp_path / "targets") == tars(top_k)
    lines = (tmp_path / "targets" / "part-0-of-1.jsonl").read_text().splitlines()
    assert len(lines) == 6  # nothing was scored twice


def test_told_to_stop_it_leaves_what_is_finished_and_goes_on(
    shards: Path, trajectory: str, top_k: Path, tmp_path: Path
) -> None:
    arguments = score_command(shards, trajectory, tmp_path / "targets")
    term = Kill("distill.targets.writer:Journal.add", 2, number=signal.SIGTERM)
    ended = distill(arguments, tmp_path, term)
    assert ended.code == 143
    assert "stopped by signal 15 after shard" in ended.output
    assert 2 <= len(finished(tmp_path / "targets")) < 6
    distill(arguments, tmp_path).ok()
    assert tars(tmp_path / "targets") == tars(top_k)


def test_two_jobs_at_once_share_the_work(shards: Path, trajectory: str, top_k: Path, tmp_path: Path) -> None:
    parts = [
        Started(score_command(shards, trajectory, tmp_path / "targets", "--part", f"{i}/2"), tmp_path / f"{i}.txt")
        for i in range(2)
    ]  # fmt: skip
    for part in parts:
        part.wait().ok()
    assert tars(tmp_path / "targets") == tars(top_k)
    journals = [(tmp_path / "targets" / f"part-{i}-of-2.jsonl").read_text().splitlines() for i in range(2)]
    assert [len(lines) for lines in journals] == [3, 3]


def test_scoring_the_first_steps_is_a_beginning_that_a_shorter_run_can_use(
    shards: Path, trajectory: str, top_k: Path, tmp_path: Path
) -> None:
    out = tmp_path / "targets"
    distill(score_command(shards, trajectory, out, "--steps", "4"), tmp_path).ok()
    assert sorted(tars(out)) == sorted(tars(top_k))[:2]
    shorter = {"steps": 4, "schedule__stages": [[0, 2]]}
    train(student(shards, tmp_path / "short", teacher__targets=str(out), **shorter))
    with pytest.raises(
        BadTargets, match="no targets of samples 32 to 51, of 96 that this run needs: let `distill score`"
    ):
        train(student(shards, tmp_path / "run", teacher__targets=str(out)))
    distill(score_command(shards, trajectory, out), tmp_path).ok()
    assert tars(out) == tars(top_k)


def test_student_that_waits_learns_while_the_teacher_is_scored(
    shards: Path, trajectory: str, hidden: Path, live: Path, tmp_path: Path
) -> None:
    out = tmp_path / "targets"
    shutil.copytree(hidden, out)
    journal = out / "part-0-of-1.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))  # 52 samples
    keys = {**STUDENT, "teacher__targets": str(out), "teacher__unfinished": "wait", "log__every": 3}
    run = Started(["train", *settings(shards, tmp_path / "run", **keys)], tmp_path / "said.txt")
    until(
        lambda: (
            "waiting for the targets of samples 48 to 55" in (tmp_path / "said.txt").read_text()
            or not run.is_alive()
        )
    )
    assert run.is_alive(), (tmp_path / "said.txt").read_text()
    assert rows(tmp_path / "run", "train")[-1]["step"] == 6
    run.signal(signal.SIGTERM)  # told to leave it does
    assert run.wait().code == 143
    run = Started(["train", *settings(shards, tmp_path / "run", **keys)], tmp_path / "again.txt")
    until(lambda: "waiting for" in (tmp_path / "again.txt").read_text() or not run.is_alive())
    assert run.is_alive(), (tmp_path / "again.txt").read_text()
    journal.write_text("".join(lines))
    run.wait().ok()
    assert rows(tmp_path / "run") == rows(live)


def until(arrived: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not arrived():
        assert time.monotonic() < end
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------------ what does not belong


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"data__mask_rate": 0.3}, "data.mask_rate: targets 0.15, this run 0.3"),
        ({"seed": 1}, "seed: targets 0, this run 1"),
        ({"data__task": "clm"}, "data.task: targets mlm, this run clm"),
        ({"data__shuffle_window": 256}, "data.shuffle_window: targets 65536, this run 256"),
        ({"data__isolate_documents": True}, "data.isolate_documents: targets False, this run True"),
        ({"steps": 13}, "was scored for 96 samples, this run needs 104"),
        (
            {"schedule__stages": [[0, 2], [5, 8], [9, 24]]},
            "names teacher step 2 from sample 32 on, .* has targets of step 8 there",
        ),
        ({"schedule__kind": "one_shot", "schedule__stages": []}, "names teacher step 24 from sample 0 on"),
    ],
)
def test_targets_of_another_question_or_schedule_are_refused(
    keys: dict[str, Any], said: str, shards: Path, hidden: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadTargets, match=said):
        train(student(shards, tmp_path / "run", teacher__targets=str(hidden), **keys))


def test_targets_of_other_data_and_of_another_tokenizer_are_refused(
    hidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_text_shards(tmp_path / "other", make=ragged_text)
    with pytest.raises(BadTargets, match="data: targets [0-9a-f]{12}, this run [0-9a-f]{12}"):
        train(student(other, tmp_path / "run", teacher__targets=str(hidden)))
    monkeypatch.setattr("tiny.TOKENIZER", dataclasses.replace(TOKENIZER, sha256="6" * 64))
    renamed = write_text_shards(tmp_path / "renamed")
    with pytest.raises(
        BadTargets, match="tokenizer: targets 555555555555 of 128 tokens, this run 666666666666"
    ):
        train(student(renamed, tmp_path / "run", teacher__targets=str(hidden)))


def test_targets_of_another_teacher_than_the_trajectory_beside_them_are_refused(
    shards: Path, trajectory: str, hidden: Path, live: Path, tmp_path: Path
) -> None:
    both = {"teacher__trajectory": trajectory, "teacher__targets": str(hidden)}
    train(student(shards, tmp_path / "run", **both))
    assert rows(tmp_path / "run") == rows(live)
    other = shutil.copytree(trajectory, tmp_path / "other")
    for name, source in (("step_00000008", "step_00000016"), ("step_00000016", "step_00000008")):
        shutil.rmtree(other / name)
        shutil.copytree(Path(trajectory) / source, other / name)
    index_trajectory(other)
    with pytest.raises(
        BadTargets, match="scored by a teacher step 8 of sha256 [0-9a-f]{12}, in .* that step has sha256"
    ):
        train(student(shards, tmp_path / "new", **{**both, "teacher__trajectory": str(other)}))


def test_run_does_not_go_on_with_targets_of_another_teacher(
    shards: Path, trajectory: str, top_k: Path, tmp_path: Path
) -> None:
    targets = shutil.copytree(top_k, tmp_path / "targets")
    asked = student(shards, tmp_path / "run", teacher__targets=str(targets), steps=12)
    train(dataclasses.replace(asked))
    (tmp_path / "run" / "result.json").unlink()
    content = json.loads((targets / "header.json").read_text())
    content["checkpoints"]["8"]["weights"] = ["f" * 64]
    (targets / "header.json").write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match="was started with a teacher step 8 .* has other weights there"):
        train(asked)


def test_shard_that_is_cut_off_is_refused_before_the_first_step(
    shards: Path, hidden: Path, tmp_path: Path
) -> None:
    targets = shutil.copytree(hidden, tmp_path / "targets")
    path = targets / "targets-000000000072.tar"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadTargets, match="targets-000000000072.tar has .* expected: delete it"):
        train(student(shards, tmp_path / "run", teacher__targets=str(targets)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_head_of_a_later_stage_that_is_missing_is_refused_before_the_first_step_and_made_again(
    shards: Path, hidden: Path, trajectory: str, tmp_path: Path
) -> None:
    targets = shutil.copytree(hidden, tmp_path / "targets")
    head = targets / "head-00000024.safetensors"
    head.unlink()
    with pytest.raises(
        BadTargets, match="head-00000024.safetensors can't be read .*run the same `distill score`"
    ):
        train(student(shards, tmp_path / "run", teacher__targets=str(targets)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    asked = student(shards, tmp_path, teacher__trajectory=trajectory)
    score(asked, targets, HIDDEN, a_shard=A_SHARD)  # all shards are there
    assert head.read_bytes() == (hidden / head.name).read_bytes()


@pytest.mark.parametrize("kind", ["tvd", "reverse_kl", "jsd"])
def test_objective_of_the_whole_distribution_is_refused_on_cut_targets(
    kind: str, shards: Path, top_k: Path, tmp_path: Path
) -> None:
    keys = {"objective__weights": {kind: 1.0}}
    with pytest.raises(
        ValueError, match=f"names {kind}, which needs the teacher's whole distribution.*top_k k=16"
    ):
        train(student(shards, tmp_path / "run", teacher__targets=str(top_k), **keys))


@pytest.mark.parametrize("temperature", [2.0, [[0, 1.0], [1, 2.0]]])
def test_temperature_that_cut_targets_were_not_made_at_is_refused(
    temperature: Any, shards: Path, top_k: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"objective.temperature is .* were made at 1.0: use that, or score again"
    ):
        train(
            student(shards, tmp_path / "run", teacher__targets=str(top_k), objective__temperature=temperature)
        )


@pytest.mark.parametrize(
    ("options", "keys", "said"),
    [
        (["--codec", "top_k", "--k", "129"], {}, "--k must be in 1..128"),
        (["--codec", "top_k", "--draws", "9"], {}, "--draws is read by codec sampled only"),
        (["--codec", "top_k"], {"schedule__kind": "saturation", "schedule__stages": []}, "saturation follows the student"),
        (["--codec", "top_k"], {"objective__temperature": [[0, 2.0], [1, 1.0]]}, "temperature=.* changes"),
        (["--codec", "top_k"], {"objective__temperature": 0.0}, "makes the teacher its arg-max"),
        (["--codec", "top_k"], {"teacher__trajectory": "", "objective__weights": {"hard": 1.0}}, "trajectory is not set"),
        (["--codec", "top_k", "--part", "2/2"], {}, "must be I/N with I in 0..N-1"),
        (["--codec", "top_k", "--steps", "-1"], {}, "at least 0"),
        (["--codec", "best"], {}, "invalid choice"),
    ],
)  # fmt: skip
def test_what_can_not_be_scored_is_refused_without_a_trace(
    options: list[str], keys: dict[str, Any], said: str, shards: Path, trajectory: str, tmp_path: Path
) -> None:
    asked = {**STUDENT, "teacher__trajectory": trajectory, **keys}
    ended = distill(
        ["score", *settings(shards, tmp_path, **asked), *options, "--out", str(tmp_path / "out")], tmp_path
    )
    assert ended.code == 2
    assert re.search(said, ended.output), ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "out").exists()


def test_targets_of_another_codec_are_not_written_into_the_same_folder(
    shards: Path, trajectory: str, top_k: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadTargets, match="their codec is top_k k=16, now sampled draws=50"):
        score(
            student(shards, tmp_path, teacher__trajectory=trajectory),
            top_k,
            make_codec("sampled", 1.0),
            a_shard=A_SHARD,
        )


def test_teacher_that_says_nan_stops_the_scoring_with_its_step(
    shards: Path, trajectory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Teacher.rows
    monkeypatch.setattr(
        Teacher, "rows", lambda self, *a: plain(self, *a)._replace(hidden_ND=torch.full((1, 32), torch.nan))
    )
    with pytest.raises(
        BadTargets, match="teacher step 2, samples 0 to 7 of the training order: .* not finite"
    ):
        score(student(shards, tmp_path, teacher__trajectory=trajectory), tmp_path / "targets", HIDDEN)
    assert finished(tmp_path / "targets") == {}


class Fail(Kill):
    """Raises an error in place of the signal."""

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == self.call:
                raise ValueError("it broke")
            return function(*args, **kwargs)

        return counted


@pytest.mark.dist
@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("distill.score_shards:keep", "teacher step 2, samples 8 to 15 of the training order: it broke"),
        ("distill.data:Samples.__getitem__", "it broke"),
    ],
    ids=["NaN", "unreadable samples"],
)
def test_rank_that_fails_amid_a_round_under_zero_3_stops_all_ranks(
    function: str, said: str, shards: Path, trajectory: str, tmp_path: Path
) -> None:
    keys = {"micro_batch_size": 8, "teacher__zero_stage": 3}
    arguments = score_command(shards, trajectory, tmp_path / "targets", **keys)
    first, second = distill_on_ranks(arguments, tmp_path, 2, Fail(function, 2))
    assert first.code == 2 and said in first.output, first.output
    assert second.code == 2 and f"rank 0: {said}" in second.output, second.output
    assert finished(tmp_path / "targets") == {}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"objective__weights": {"hard": 1.0}},
            "teacher.targets is set but objective.weights only has `hard`",
        ),
        ({"teacher__unfinished": "newest"}, "teacher.unfinished=newest is for a trajectory"),
        (
            {"schedule__kind": "saturation", "schedule__stages": []},
            "nobody knew when teacher.targets were scored",
        ),
    ],
)
def test_settings_that_contradict_targets_are_refused(
    keys: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        student(tmp_path, tmp_path / "run", teacher__targets="somewhere", **keys)


def test_header_names_data_tokenizer_masks_teacher_and_codec(
    hidden: Path, shards: Path, trajectory: str
) -> None:
    told = load_header(hidden)
    samples = Samples(config(shards, hidden).data, "train", 0, shuffle=True)
    assert told.samples["data"] == samples.fingerprint
    assert told.samples["data.mask_rate"] == 0.15 and told.samples["seed"] == 0
    assert told.tokenizer_sha256 == TOKENIZER.sha256
    assert {step: scorer.weights for step, scorer in told.checkpoints.items()}.keys() == {2, 8, 24}
    assert told.codec == HIDDEN
