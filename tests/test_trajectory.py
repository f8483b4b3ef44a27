"""A trajectory from which nobody should learn is refused: the message names step, file and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LENGTH, SIZES, VOCABULARY, Kill, distill, rows, settings, write_tokenizer

from data_prep.__main__ import main as data_prep_main
from data_prep.encoding import INFO_NAME, load_tokenizer
from data_prep.files import sha256_of
from data_prep.tokenizer_train import train_model
from distill.build import first_schedule
from distill.config import Config, ScheduleConfig
from distill.trajectory.audit.verdicts import refuse_bad_steps
from distill.trajectory.facts import tokenizer_identity
from distill.trajectory.index import index_trajectory
from distill.trajectory.manifest import BadTrajectory, Checkpoint, Manifest, load_manifest
from distill.trajectory.store import open_store

# ------------------------------------------------------------------------------------------------ manifest


@pytest.fixture
def trajectory(teacher_run: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(teacher_run / "trajectory", tmp_path / "trajectory"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_manifest_of_a_teacher_run_describes_every_checkpoint(teacher_run: Path) -> None:
    manifest = load_manifest(teacher_run / "trajectory")
    assert list(manifest.checkpoints) == [2, 4, 8, 16, 24]
    assert manifest.complete
    assert (manifest.family, manifest.architecture, manifest.vocab_size) == ("distill", "bert", 128)
    assert set(manifest.losses) == set(manifest.checkpoints)
    assert [c.tokens for c in manifest.checkpoints.values()] == sorted(
        c.tokens for c in manifest.checkpoints.values()
    )


def test_student_learns_from_a_teacher_with_padded_logits_and_other_architecture(
    shards: Path, tmp_path: Path
) -> None:
    """The manifest tells what the model is, also one that was loaded, not what the config would have built."""
    sizes = {**SIZES["modernbert"], "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY + 16}
    short = {"save__trajectory_every": 2, "steps": 2}
    new = settings(
        shards, tmp_path / "new", **short, model__architecture="modernbert", model__overrides=sizes
    )
    distill(["train", *new], tmp_path).ok()
    loaded = settings(shards, tmp_path / "loaded", **short, model__init_from=str(tmp_path / "new" / "model"))
    distill(["train", *loaded], tmp_path).ok()
    for name in ("new", "loaded"):
        manifest = load_manifest(tmp_path / name / "trajectory")
        assert (manifest.architecture, manifest.vocab_size) == ("modernbert", VOCABULARY + 16)
        taught = {"teacher__trajectory": str(manifest.url), "steps": 2, "log__every": 1}
        distill(["train", *settings(shards, tmp_path / f"of_{name}", **taught)], tmp_path).ok()
        assert all(row["soft"] > 0 for row in rows(tmp_path / f"of_{name}", "train"))


def test_indexing_a_folder_finds_what_the_run_wrote(trajectory: Path) -> None:
    before = load_manifest(trajectory)
    (trajectory / "manifest.json").unlink()
    after = index_trajectory(trajectory)
    assert {s: c.files for s, c in after.checkpoints.items()} == {
        s: c.files for s, c in before.checkpoints.items()
    }
    assert load_manifest(trajectory) == after


def test_indexing_again_keeps_what_only_the_run_knew_of_unchanged_checkpoints(trajectory: Path) -> None:
    edit(trajectory, lambda c: c.update(complete=False))
    before = load_manifest(trajectory)
    (trajectory / "step_00000024").rename(trajectory / "step_00000032")
    rewrite(trajectory, 16, lambda w: first_of(w, 0.5))
    after = load_manifest(trajectory)
    assert (after.tokenizer_sha256, after.complete) == (before.tokenizer_sha256, False)
    assert {s: after.checkpoints[s] for s in (2, 4, 8)} == {s: before.checkpoints[s] for s in (2, 4, 8)}
    changed = [after.checkpoints[s] for s in (16, 32)]
    assert [(c.tokens, c.validation_loss) for c in changed] == [(None, None)] * 2


def test_broken_manifest_is_made_anew_and_the_loss_is_said(
    trajectory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (trajectory / "manifest.json").write_text("{")
    assert index_trajectory(trajectory).complete
    assert "is no manifest" in caplog.text
    assert "what it told of tokens and validation losses is lost" in caplog.text


def test_mislabelled_checkpoint_that_was_removed_leaves_the_others_known(trajectory: Path) -> None:
    losses = load_manifest(trajectory).losses
    double = {"step": 32, "location": "step_00000032"}
    edit(trajectory, lambda c: c["checkpoints"].append({**c["checkpoints"][-1], **double}))
    with pytest.raises(
        BadTrajectory, match=r"1 bad teacher .*\n  step 32: holds the same weights as step 24"
    ):
        refuse_bad_steps(load_manifest(trajectory), [16, 32])
    assert index_trajectory(trajectory).losses == losses


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("source", ["sentencepiece", "sentencepiece file", "huggingface", "both files"])
def test_identity_of_a_checkpoints_tokenizer_is_the_one_of_shards_made_with_it(
    source: str, shards: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    if source == "huggingface":
        write_tokenizer(given)
    else:
        (given / "tokenizer.model").write_bytes(train_model([b"the quick brown fox jumps " * 50], 290, "bpe"))
    if source != "sentencepiece file" and source != "huggingface":
        run_tokenizer(["--from", str(given / "tokenizer.model"), "--out", str(tmp_path / "ours")])
        shutil.rmtree(given)
        shutil.copytree(tmp_path / "ours", given)
    if source == "both files":  # as a Llama has them
        (given / "tokenizer_info.json").unlink()
    run_tokenizer(["--from", str(given), "--out", str(tmp_path / "tokenizer")])
    info = json.loads((given / INFO_NAME).read_text()) if (given / INFO_NAME).exists() else {}
    files = {path.name: [path.stat().st_size, sha256_of(path)] for path in given.iterdir()}
    known = tokenizer_identity(Checkpoint(0, "given", files), info)
    assert known == load_tokenizer(tmp_path / "tokenizer").info.sha256


def run_tokenizer(arguments: list[str]) -> None:
    assert data_prep_main(["tokenizer", *arguments]) == 0


def test_tokenizer_of_a_folder_without_manifest_is_found_and_another_one_refused(
    trajectory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (trajectory / "manifest.json").unlink()
    sha = index_trajectory(trajectory).tokenizer_sha256
    assert sha == sha256_of(trajectory / "step_00000002" / "tokenizer.json")
    path = trajectory / "step_00000008" / "tokenizer.json"
    path.write_text(path.read_text().replace("w77", "w77x"))
    manifest = index_trajectory(trajectory)
    assert manifest.tokenizer_sha256 == sha
    assert caplog.messages == ["step 8: its tokenizer (tokenizer.json) is another than at most steps"]
    with pytest.raises(
        BadTrajectory, match=r"step 8: its tokenizer .*; the nearest good steps are \[4, 16\]"
    ):
        refuse_bad_steps(manifest, [4, 8])
    for step in (2, 4, 8, 16, 24):
        (trajectory / f"step_{step:08d}" / "tokenizer.json").unlink()
    (trajectory / "manifest.json").unlink()
    assert index_trajectory(trajectory).tokenizer_sha256 is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "manifest.json").unlink(), "does not exist: for checkpoints without a manifest run"),
        (lambda f: (f / "manifest.json").write_text("{"), "is no manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is no manifest"),
        (lambda f: edit(f, lambda c: c.pop("schema")), "is no manifest"),
        (lambda f: edit(f, lambda c: c.update(schema=7)), "has another schema than 2"),
        (lambda f: edit(f, lambda c: c.update(colour="red")), "is no manifest"),
        (lambda f: edit(f, lambda c: c["checkpoints"][0].pop("files")), "is no manifest"),
    ],
)
def test_manifest_that_can_not_be_read_is_named(trajectory: Path, spoil: Any, said: str) -> None:
    spoil(trajectory)
    with pytest.raises(BadTrajectory, match=said) as caught:
        load_manifest(trajectory)
    assert "manifest.json" in str(caught.value)


def copy_weights(trajectory: Path, source: int, target: int) -> None:
    folder = trajectory / f"step_{source:08d}"
    shutil.copy(folder / "model.safetensors", trajectory / f"step_{target:08d}" / "model.safetensors")


def test_same_weights_under_two_steps_are_warned_of_and_refused_where_they_would_teach(
    trajectory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy_weights(trajectory, 4, 16)
    manifest = index_trajectory(trajectory)
    assert "step 16: holds the same weights as step 4: one is mislabelled" in caplog.messages
    refuse_bad_steps(manifest, [2, 8, 24])
    with pytest.raises(
        BadTrajectory, match=r"2 bad teacher checkpoint(.|\n)*nearest good steps are \[8, 24\]"
    ):
        refuse_bad_steps(manifest, [4, 16])


def test_mixed_architectures_and_empty_checkpoints_are_warned_of(
    trajectory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = trajectory / "step_00000004" / "config.json"
    path.write_text(path.read_text().replace('"vocab_size": 128', '"vocab_size": 129'))
    (trajectory / "step_00000008" / "model.safetensors").unlink()
    (trajectory / "step_00000016" / "config.json").unlink()
    manifest = index_trajectory(trajectory)
    assert manifest.vocab_size == 128
    assert "step 4 is of another kind (architecture, vocabulary) than most: ('bert', 129)" in caplog.messages
    assert {"step 8: it has no weights", "step 16: config.json is missing"} <= set(caplog.messages)


# ------------------------------------------------------------------------------------------------ runs


def rewrite(trajectory: Path, step: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of a checkpoint and index it anew, as whoever made them so would have done."""
    path = trajectory / f"step_{step:08d}" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    index_trajectory(trajectory)


def first_of(weights: dict[str, torch.Tensor], value: float) -> None:
    weights["bert.encoder.layer.0.output.dense.weight"][0, 0] = value


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


ONE_SHOT = {"schedule__kind": "one_shot"}
WEIGHTS_24 = "step_00000024/model.safetensors"
BAD = {
    "a step that is missing": (
        lambda f: None,
        {"schedule__checkpoints": [13]},
        ["teacher step 13, which the trajectory lacks; the nearest are [8, 16]"],
    ),
    "truncated weights": (
        lambda f: truncate(f / WEIGHTS_24),
        {},
        ["teacher step 24", WEIGHTS_24, "bytes, the manifest says", "fetch it again"],
    ),
    "a flipped bit": (
        lambda f: flip(f / WEIGHTS_24),
        {},
        ["teacher step 24", WEIGHTS_24, "has sha256", "fetch it again"],
    ),
    "a missing file": (
        lambda f: (f / WEIGHTS_24).unlink(),
        {},
        ["teacher step 24", WEIGHTS_24, "is missing"],
    ),
    "weights truncated before they were indexed": (
        lambda f: (truncate(f / WEIGHTS_24), index_trajectory(f)),
        {},
        ["teacher step 24", WEIGHTS_24, "the tensors end at byte"],
    ),
    "a NaN": (
        lambda f: rewrite(f, 24, lambda w: first_of(w, float("nan"))),
        {},
        ["teacher step 24", "bert.encoder.layer.0.output.dense.weight holds values that are not finite"],
    ),
    "an infinity": (
        lambda f: rewrite(f, 24, lambda w: first_of(w, float("inf"))),
        {},
        ["teacher step 24", "not finite"],
    ),
    "a missing weight": (
        lambda f: rewrite(f, 24, lambda w: w.pop("bert.encoder.layer.0.output.dense.weight")),
        {},
        ["teacher step 24", "lacks the weights bert.encoder.layer.0.output.dense.weight"],
    ),
    "another tokenizer": (
        lambda f: edit(f, lambda c: c.update(tokenizer_sha256="9" * 64)),
        {},
        ["trained with tokenizer 999999999999, not with 555555555555"],
    ),
    "another vocabulary": (
        lambda f: edit(f, lambda c: c.update(vocab_size=100)),
        {},
        ["the teacher has 100 logits, the tokenizer 128 tokens"],
    ),
    "a vocabulary that the manifest hides": (
        lambda f: hide_vocabulary(f),
        {},
        ["teacher step 24", "has 100 logits, the manifest says 128"],
    ),
    "another task": (
        lambda f: None,
        {"data__task": "clm", "model__architecture": "gpt2"},
        ["teacher step 24", "holds a bert, a model for mlm, not for clm"],
    ),
    "the same weights under two steps": (
        lambda f: (copy_weights(f, 8, 24), index_trajectory(f)),
        {},
        ["step 24: holds the same weights as step 8", "the nearest good steps are [16]"],
    ),
    "a run that has not ended": (
        lambda f: edit(f, lambda c: c.update(complete=False)),
        {},
        ["the teacher's run has not ended, its newest checkpoint is step 24"],
    ),
}  # fmt: skip


def hide_vocabulary(trajectory: Path) -> None:
    """A checkpoint with fewer logits than its manifest says."""
    import transformers

    folder = trajectory / "step_00000024"
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    for step in (2, 4, 8, 16):
        shutil.rmtree(trajectory / f"step_{step:08d}")
    model.save_pretrained(folder)
    index_trajectory(trajectory)
    edit(trajectory, lambda c: c.update(vocab_size=128, tokenizer_sha256=None))


@pytest.mark.filterwarnings("ignore")  # of transformers, in making one of them
@pytest.mark.parametrize("what", BAD)
def test_student_of_a_bad_trajectory_is_refused_before_it_binds_its_folder(
    what: str, trajectory: Path, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    spoil, changes, said = BAD[what]
    spoil(trajectory)
    changes = {**ONE_SHOT, **changes, "teacher__trajectory": str(trajectory)}
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert ended.code == 2, ended.output
    for words in said:
        assert words in ended.output
    assert "Traceback" not in ended.output
    left = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*")}
    assert left <= {"run.lock"}


EARLY = {"checkpoints": [4]}
STAGES = {"stages": [[0, 4]]}


@pytest.mark.parametrize(
    ("kind", "changes", "is_named"),
    [
        ("one_shot", {}, False),
        ("one_shot", STAGES, False),
        ("one_shot", EARLY, True),
        ("two_shot", EARLY, False),
        ("two_shot", {"checkpoints": [4, 16]}, True),
        ("equal", STAGES, False),
        ("equal", {"checkpoints": [4, 16]}, True),
        ("n_t", {"stage_steps": 2}, False),
        ("n_t", {"stage_steps": 2, **EARLY}, True),
        ("speed", STAGES, False),
        ("speed", EARLY, True),
        ("explicit", STAGES, True),
    ],
)
def test_run_that_has_not_ended_teaches_only_where_every_teacher_step_is_named(
    kind: str, changes: dict[str, Any], is_named: bool
) -> None:
    some = {step: Checkpoint(step, f"step_{step}", {}, None, 5.0 - step / 8) for step in (2, 4, 8, 16, 24)}
    trajectory = Manifest(open_store("teacher"), "distill", "bert", VOCABULARY, checkpoints=some)
    student = Config(steps=12, schedule=ScheduleConfig(kind=kind, **changes))
    if is_named:
        assert first_schedule(student, trajectory).stages
    else:
        with pytest.raises(BadTrajectory, match="has not ended, its newest checkpoint is step 24"):
            first_schedule(student, trajectory)


def test_bad_checkpoint_of_a_later_stage_stops_the_run_with_its_state_saved(
    trajectory: Path, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    good = (trajectory / WEIGHTS_24).read_bytes()
    truncate(trajectory / WEIGHTS_24)
    stages = {"schedule__kind": "explicit", "schedule__stages": [[0, 2], [7, 24]]}
    arguments = ["train", *settings(shards, tmp_path / "run", **stages, teacher__trajectory=str(trajectory))]
    ended = distill(arguments, tmp_path)
    assert ended.code == 2
    assert "teacher step 24" in ended.output
    saved = [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert saved == ["step_00000005", "step_00000007"]  # no finished step is lost
    (trajectory / WEIGHTS_24).write_bytes(good)
    distill(arguments, tmp_path).ok()


def test_trajectory_that_grows_changes_nothing_for_a_run_that_goes_on(
    trajectory: Path, shards: Path, tmp_path: Path
) -> None:
    """The final teacher of the first start stays the final teacher."""
    final = trajectory / "step_00000024"
    final.rename(tmp_path / "later")
    index_trajectory(trajectory)
    changes = {"schedule__kind": "equal", "teacher__trajectory": str(trajectory), "log__every": 1}
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 8)).code == -9
    (tmp_path / "later").rename(final)
    index_trajectory(trajectory)
    distill(arguments, tmp_path).ok()
    assert [row["teacher_step"] for row in rows(tmp_path / "run", "train")] == [2] * 3 + [4] * 3 + [8] * 3 + [
        16
    ] * 3
