"""Which checkpoint taught which sample, seen inside a real run; the limits in which distillation must be plain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZES, TOKENIZER, VOCABULARY, assert_same_run, config, rows, weights

import distill.train
from distill.build import build_run
from distill.data import Batch
from distill.distributed import start
from distill.kernels import Head, divergence
from distill.models import Inputs, Rows, build_model, counted_rows
from distill.pretrained import load_model
from distill.teacher import Teacher
from distill.train import train
from distill.trajectory.index import index_trajectory

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other


class Crash(Exception):
    """The process is lost, as far as the run is concerned."""


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(first sample of the batch, teacher step) of every step, the latter told by the weights that taught."""
    seen: list[tuple[int, int]] = []
    plain = distill.train.train_step

    def watched(run: Any, batches: Any, objective: Any, lr: float, state: Any, window: Any) -> Any:
        seen.append((state.consumed, step_of(run.teacher)))
        return plain(run, batches, objective, lr, state, window)

    monkeypatch.setattr(distill.train, "train_step", watched)
    yield seen


def step_of(teacher: Any) -> int:
    """The trajectory's step that holds the weights which the teacher has now."""
    manifest = teacher.manifest
    name = "bert.embeddings.word_embeddings.weight"
    own = teacher.model.state_dict()[name]
    for step, checkpoint in manifest.checkpoints.items():
        if torch.equal(load_file(Path(manifest.url) / checkpoint.location / "model.safetensors")[name], own):
            return int(step)
    raise AssertionError("weights of no checkpoint")


STAGES = [[0, 2], [4, 8], [5, 4], [9, 24]]
EXPECTED = [2] * 4 + [8] + [4] * 4 + [24] * 5


def student(shards: Path, teacher_run: Path, run_dir: Path, **changes: Any) -> Any:
    values = {"steps": 14, "schedule__kind": "explicit", "schedule__stages": STAGES, **changes}
    return config(shards, run_dir, teacher__trajectory=str(teacher_run / "trajectory"), **values)


def test_teacher_changes_exactly_at_stage_boundaries(
    shards: Path, teacher_run: Path, tmp_path: Path, taught: list[tuple[int, int]]
) -> None:
    train(student(shards, teacher_run, tmp_path / "run", log__every=1))
    assert taught == [(8 * step, teacher) for step, teacher in enumerate(EXPECTED)]
    assert [row["teacher_step"] for row in rows(tmp_path / "run", "train")] == EXPECTED


@pytest.mark.parametrize("crash_at", [2, 5, 7, 10])
def test_run_that_goes_on_in_mid_stage_keeps_the_teacher_of_every_sample(
    crash_at: int, shards: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    taught: list[tuple[int, int]],
) -> None:  # fmt: skip
    """Saves are due after steps 5 and 10: those after the last save are taught again, by the same checkpoints."""
    settings = student(shards, teacher_run, tmp_path / "run")
    watched = distill.train.train_step

    def crashing(run: Any, batches: Any, objective: Any, lr: float, state: Any, window: Any) -> Any:
        if state.step == crash_at:
            raise Crash
        return watched(run, batches, objective, lr, state, window)

    with monkeypatch.context() as patch:
        patch.setattr(distill.train, "train_step", crashing)
        with pytest.raises(Crash):
            train(settings)
    train(settings)
    saved = crash_at // 5 * 5
    order = [*range(crash_at), *range(saved, 14)]
    assert taught == [(8 * step, EXPECTED[step]) for step in order]


def test_one_shot_is_progressive_with_one_stage_to_the_bit(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    one = {"schedule__kind": "one_shot", "schedule__stages": []}
    equal = {"schedule__kind": "equal", "schedule__num_stages": 1, "schedule__stages": []}
    train(student(shards, teacher_run, tmp_path / "one", **one))
    train(student(shards, teacher_run, tmp_path / "equal", **equal))
    assert_same_run(tmp_path / "one", tmp_path / "equal")


@pytest.mark.parametrize(("dtype", "zero"), [("fp32", 1e-6), ("bf16", 1e-4)])
def test_kl_is_zero_for_a_student_that_is_its_teacher(
    dtype: str, zero: float, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes = {
        "schedule__kind": "one_shot",
        "schedule__stages": [],
        "engine__dtype": dtype,
        "teacher__dtype": dtype,
    }
    init_from = str(teacher_run / "trajectory" / "step_00000024")
    train(
        student(
            shards,
            teacher_run,
            tmp_path / "run",
            **changes,
            model__init_from=init_from,
            log__every=1,
            steps=3,
        )
    )
    first = rows(tmp_path / "run", "train")[0]
    assert abs(first["soft"]) < zero
    assert first["soft_ce"] > 1


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "modernbert"])
def test_teacher_in_bf16_says_what_its_folder_says_in_bf16_at_far_positions(
    architecture: str, tmp_path: Path
) -> None:
    """Rotary frequencies stay fp32, also after a swap. Rounded to bf16 they give these models a KL of up to 0.01 a row."""
    length, task = 1024, "mlm" if architecture == "modernbert" else "clm"
    for step in (1, 2):
        keys = {**SIZES[architecture], "max_position_embeddings": length, "initializer_range": 0.3}
        sizes = {
            "vocab_size": VOCABULARY,
            "sequence_length": length,
            "special_ids": {"pad_token_id": 0},
            "seed": step,
        }
        build_model(task, architecture, keys, **sizes).save_pretrained(tmp_path / f"step_{step}")
    settings = config(Path("shards"), tmp_path / "run", data__task=task, teacher__dtype="bf16")
    teacher = Teacher(index_trajectory(tmp_path), settings, TOKENIZER, length, start())
    inputs = Inputs(torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator()), None, None)
    for step in (1, 2):
        teacher.use(step)
        said = teacher.rows(inputs, torch.arange(length))
        same = load_model(task, tmp_path / f"step_{step}", torch.bfloat16, length).eval()
        with torch.no_grad():
            own = counted_rows(same, inputs, torch.arange(length))
            found = divergence(own.head(own.hidden_ND), said.head(said.hidden_ND), None)
        assert float(found.soft) / length < 1e-6
    teacher.close()


def test_student_learns_its_teacher(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    changes = {"schedule__kind": "one_shot", "schedule__stages": [], "seed": 5, "optim__lr": 1e-2}
    train(student(shards, teacher_run, tmp_path / "run", **changes, steps=60, log__every=5))
    soft = [row["soft"] for row in rows(tmp_path / "run", "train")]
    assert soft[-1] < 0.5 * soft[0]


class AlwaysRight:
    """A teacher of causal models whose logits are the token that follows, and nothing else."""

    swap_seconds, bytes_read, work = 0.0, 0, None

    def __init__(self, *_: Any) -> None: ...

    def await_next(self, *_: Any) -> bool:
        return True

    def follow(self, *_: Any) -> float:
        return 0.0

    def signal(self, batch: Batch) -> Rows:
        following = batch.inputs.input_ids_BL.flatten()[batch.rows_N + 1]
        return Rows(
            torch.nn.functional.one_hot(following, VOCABULARY).float(), Head(9 * torch.eye(VOCABULARY))
        )

    def close(self) -> None: ...


def test_hard_labels_are_the_cold_limit_of_a_teacher_that_is_always_right(
    shards: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clm = {"data__task": "clm"}
    train(config(shards, tmp_path / "hard", **clm))
    monkeypatch.setattr(distill.build, "Teacher", AlwaysRight)
    trajectory = str(teacher_run / "trajectory")
    train(
        config(shards, tmp_path / "soft", **clm, teacher__trajectory=trajectory, objective__temperature=0.0)
    )
    hard, soft = rows(tmp_path / "hard", "train"), rows(tmp_path / "soft", "train")
    assert [r["hard"] for r in soft] == pytest.approx([r["hard"] for r in hard], rel=1e-6)
    assert [r["soft"] for r in soft] == pytest.approx([r["hard"] for r in hard], rel=1e-6)
    assert weights(tmp_path / "soft") == weights(tmp_path / "hard")


def test_teacher_is_frozen_and_has_no_gradient(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = build_run(student(shards, teacher_run, tmp_path / "run"), start(), tmp_path / "run")
    run.follow_schedule(0)
    assert run.teacher is not None and run.teacher.model is not None
    assert not any(p.requires_grad for p in run.teacher.model.parameters())
    assert not run.teacher.model.training
    said = run.teacher.rows(run.samples[np.arange(2)].inputs, torch.arange(5))
    assert not said.hidden_ND.requires_grad
    run.teacher.close()
