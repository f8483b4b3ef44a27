"""Teacher and student whose logits are padded to different sizes: 50304 columns and 50432 or 50688, both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LENGTH, SIZES, VOCABULARY, config, rows, text, write_tokenizer

from data_prep.shards import TokenizerInfo, write_shards
from distill.distributed import start
from distill.models import Inputs, Rows, build_model, counted_rows
from distill.objectives import Objective
from distill.teacher import Teacher
from distill.train import train
from distill.trajectory.index import index_trajectory
from distill.trajectory.manifest import BadTrajectory, load_manifest

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other

REAL = 50254  # tokens of Pythia's tokenizer, whose models have 50304 columns, or 50432 and 50688
NEOX = TokenizerInfo("7" * 64, REAL, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=4)
PAIRS = [(50304, 50432), (50304, 50688), (50432, 50304), (50688, 50304)]
NARROW = {**SIZES["gpt_neox"], "hidden_size": 16, "intermediate_size": 32}


@pytest.fixture(scope="module")
def neox_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts over the whole vocabulary, the last token included."""
    folder = tmp_path_factory.mktemp("neox") / "shards"

    def spread(packed: np.ndarray) -> np.ndarray:
        return np.where(packed < 5, packed, REAL - VOCABULARY + packed)

    splits = {"train": spread(text(16, 1)), "validation": spread(text(4, 2))}
    write_shards(folder, splits, NEOX, sequence_length=LENGTH, samples_per_shard=8)
    write_tokenizer(folder / "tokenizer")
    return folder


def model_of(columns: int, seed: int) -> torch.nn.Module:
    return build_model(
        "clm",
        "gpt_neox",
        {**NARROW, "max_position_embeddings": LENGTH, "initializer_range": 0.5},
        vocab_size=columns,
        sequence_length=LENGTH,
        special_ids={},
        seed=seed,
    )


def trajectory_of(folder: Path, columns: int) -> Path:
    for step in (1, 2):
        model_of(columns, step).save_pretrained(folder / f"step{step}")  # type: ignore[operator]
    index_trajectory(folder)
    return folder


@pytest.mark.parametrize(("teacher_columns", "student_columns"), PAIRS)
def test_divergence_is_that_of_the_real_tokens_and_padding_gets_no_gradient(
    teacher_columns: int, student_columns: int, tmp_path: Path
) -> None:
    trajectory = trajectory_of(tmp_path, teacher_columns)
    keys = {"data__task": "clm", "teacher__trajectory": str(trajectory)}
    settings = config(Path("shards"), tmp_path, **keys)
    teacher = Teacher(load_manifest(trajectory), settings, NEOX, LENGTH, start())
    teacher.use(2)
    student = model_of(student_columns, 3)
    inputs, rows_N = Inputs(torch.arange(LENGTH).view(1, -1) + REAL - LENGTH, None, None), torch.arange(8)
    said: Rows = teacher.rows(inputs, rows_N)
    own = counted_rows(student, inputs, rows_N)  # type: ignore[arg-type]
    labels_N = torch.arange(8) + REAL - 8
    found = Objective(settings.objective, REAL, 0.0)(own, said, labels_N)
    found.loss.backward()

    p = torch.log_softmax(said.head(said.hidden_ND).double()[:, :REAL], -1)
    q = torch.log_softmax(own.head(own.hidden_ND).double()[:, :REAL], -1)
    assert float(found.soft) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
    gradient = student.get_output_embeddings().weight.grad  # type: ignore[operator]
    assert gradient.shape[0] == student_columns
    assert not gradient[REAL:].any()
    assert gradient[:REAL].any()
    teacher.close()


@pytest.mark.parametrize(("teacher_columns", "student_columns"), PAIRS[1:3])
def test_student_trains_and_keeps_its_own_columns(
    teacher_columns: int, student_columns: int, neox_shards: Path, tmp_path: Path
) -> None:
    trajectory = trajectory_of(tmp_path / "teacher", teacher_columns)
    sizes = {**NARROW, "max_position_embeddings": LENGTH, "vocab_size": student_columns}
    keys = {"data__task": "clm", "model__architecture": "gpt_neox", "model__overrides": sizes}
    stages = {"schedule__kind": "equal", "steps": 4, "batch_size": 2, "log__every": 1}
    run_dir = tmp_path / "run"
    train(config(neox_shards, run_dir, **keys, **stages, teacher__trajectory=str(trajectory)))
    assert [row["teacher_step"] for row in rows(run_dir, "train")] == [1, 1, 2, 2]
    assert all(row["soft"] > 0 for row in rows(run_dir, "train"))


def test_teacher_with_fewer_columns_than_there_are_tokens_is_refused(tmp_path: Path) -> None:
    manifest = load_manifest(trajectory_of(tmp_path, REAL - 1))
    with pytest.raises(
        BadTrajectory, match=f"the teacher has {REAL - 1} logits, the tokenizer {REAL} tokens"
    ):
        Teacher(manifest, config(Path("shards"), tmp_path, data__task="clm"), NEOX, LENGTH, start())


def test_teacher_with_another_tokenizer_is_refused_whatever_its_columns(tmp_path: Path) -> None:
    manifest = load_manifest(trajectory_of(tmp_path, 50304))
    manifest.tokenizer_sha256 = "8" * 64
    with pytest.raises(BadTrajectory, match="was trained with tokenizer 888888888888, not with 777777777777"):
        Teacher(manifest, config(Path("shards"), tmp_path, data__task="clm"), NEOX, LENGTH, start())
