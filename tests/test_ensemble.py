"""Several checkpoints teach together: who they are, what they say in float64, and real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, Kill, assert_same_run, config, distill, distill_on_ranks, rows, settings

from distill.config_reader import ConfigError
from distill.data import Samples
from distill.ensemble import pooled
from distill.head import Head
from distill.models import Rows, counted_rows
from distill.pretrained import load_model
from distill.schedule import together

POOLS = ("probs", "log_probs", "gold")
STEPS = (2, 4, 8, 16, 24)  # of `teacher_run`


def test_members_are_the_last_ones_up_to_the_named_step_and_keep_their_slots() -> None:
    known = [0, 10, 20, 30, 40, 50]
    seen = [together(step, known, 3) for step in known[1:]]
    assert [sorted(set(steps)) for steps in seen] == [
        [10],
        [10, 20],
        [10, 20, 30],
        [20, 30, 40],
        [30, 40, 50],
    ]
    assert together(30, reversed(known), 1) == [30]
    for before, after in zip(seen[2:], seen[3:], strict=False):  # one slot of three changes
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def members(num_rows: int, dtype: torch.dtype = torch.float32) -> list[Rows]:
    torch.manual_seed(0)
    return [
        Rows(torch.randn(num_rows, 6).to(dtype), Head(torch.randn(VOCABULARY + 3, 6).to(dtype)))
        for _ in range(3)
    ]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_the_mean_that_it_names(pool: str) -> None:
    said, labels = members(5), torch.tensor([3, 0, 127, 9, 9])
    together_ND, head = pooled(said, labels, pool, VOCABULARY)[:2]
    found = head(together_ND).log_softmax(1)
    for n in range(5):
        p = [(r.head.weight_VD[:VOCABULARY].double() @ r.hidden_ND[n].double()).softmax(0) for r in said]
        gold = torch.stack([each[labels[n]] for each in p])
        mean = {
            "probs": sum(p) / 3,
            "log_probs": torch.stack([each.log() for each in p]).mean(0).softmax(0),
            "gold": sum(w * each for w, each in zip(gold / gold.sum(), p, strict=True)),
        }[pool]
        torch.testing.assert_close(found[n].exp().double(), mean, rtol=1e-4, atol=1e-6)


def test_no_rows_are_pooled_to_no_rows() -> None:
    found = pooled(members(0), torch.zeros(0, dtype=torch.int64), "gold", VOCABULARY)
    assert found.head(found.hidden_ND).shape == (0, VOCABULARY)


def student(teacher_run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "teacher__trajectory": str(teacher_run / "trajectory"), "teacher__ensemble": 3, "steps": 8,
        "schedule__kind": "explicit", "schedule__stages": [[0, 2], [2, 8], [5, 24]], "log__every": 1, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("pool", POOLS)
def test_a_run_learns_from_what_its_members_say_together(
    pool: str, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    """The cross-entropy with the teacher is linear in it: with one at step 0 of the student it shows who taught."""
    changes = student(teacher_run, teacher__pool=pool, schedule__stages=[[0, 24]], steps=1, log__every=1)
    distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path).ok()
    (row,) = rows(tmp_path / "run", "train")
    run = config(shards, tmp_path / "run", **changes)
    batch = Samples(run.data, "train", run.seed, shuffle=True)[np.arange(8)]
    models = [
        load_model("mlm", teacher_run / "trajectory" / f"step_{step:08d}", torch.float32, 32)
        for step in (8, 16, 24)
    ]
    with torch.no_grad():
        said = [counted_rows(model.eval(), batch.inputs, batch.rows_N) for model in models]
        p = torch.stack([r.head(r.hidden_ND)[:, :VOCABULARY].double().softmax(1) for r in said])
    gold = p.gather(2, batch.labels_N.expand(3, -1)[:, :, None])
    mean = {
        "probs": p.mean(0),
        "log_probs": p.log().mean(0).softmax(1),
        "gold": (gold / gold.sum(0) * p).sum(0),
    }[pool]
    entropy = -(mean * mean.log()).sum(1).mean()
    # soft = KL = cross-entropy - entropy of the teacher
    assert row["soft_ce"] - row["soft"] == pytest.approx(float(entropy), rel=1e-4)


def test_an_ensemble_killed_while_it_teaches_goes_on_to_the_same_bits(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes = student(teacher_run, save__every=3)
    distill(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path).ok()
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    assert distill(arguments, tmp_path, Kill("distill.train:train_step", call=5)).code == -9
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "calm", tmp_path / "run")


def test_two_ranks_learn_from_the_same_ensemble_as_one_also_if_its_weights_are_dealt_over_them(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes = student(teacher_run, steps=4, schedule__stages=[[0, 8], [2, 24]], teacher__pool="gold")
    distill(["train", *settings(shards, tmp_path / "one", **changes)], tmp_path).ok()
    for stage in (0, 3):
        run = tmp_path / f"two_{stage}"
        arguments = ["train", *settings(shards, run, **changes, teacher__zero_stage=stage)]
        for ended in distill_on_ranks(arguments, tmp_path, 2):
            ended.ok()
        for one, two in zip(rows(tmp_path / "one", "train"), rows(run, "train"), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_a_member_that_failed_the_audit_is_refused_though_the_schedule_does_not_name_it(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "trajectory"
    shutil.copytree(teacher_run / "trajectory", copy)
    weights = next((copy / "step_00000016").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    distill(["trajectory", "audit", str(copy)], tmp_path)
    changes = student(teacher_run, teacher__trajectory=str(copy), schedule__stages=[[0, 24]])
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert ended.code == 2 and "step 16" in ended.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__ensemble": 0}, "teacher.ensemble must be above 0"),
        ({"teacher__unfinished": "wait"}, "needs a teacher whose run has ended"),
        ({"teacher__targets": "t"}, "leave out teacher.targets or the ensemble"),
        (
            {"teacher__ensemble": 1, "teacher__pool": "gold"},
            "is read with teacher.ensemble of 2 or more only",
        ),
    ],
)
def test_ensembles_that_can_not_teach_are_refused(
    changes: dict[str, Any], message: str, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(shards, tmp_path / "run", **student(teacher_run, **changes))


def test_an_objective_that_looks_into_the_teacher_is_refused(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes = student(teacher_run, objective__weights={"forward_kl": 1.0, "hidden_cosine": 1.0})
    ended = distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    assert (
        ended.code == 2
        and "needs more of the teacher than there is, as several models teach together" in ended.output
    )
