"""Texts that the student continues and the teacher corrects: who said which word, and real runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import (
    LENGTH,
    SIZES,
    TOKENIZER,
    VOCABULARY,
    Kill,
    assert_same_run,
    config,
    distill,
    rows,
    settings,
    text,
)
from torch import Tensor

from distill.data import Batch
from distill.models import Inputs, build_model
from distill.speculative import continued
from distill.train import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed, transformers and torch, about each other
HALF = LENGTH // 2
ARCHITECTURES = ["gpt2", "gpt_neox", "llama"]


def model(architecture: str, seed: int, loud: float = 12.0) -> Any:
    """loud: its logits are multiplied by it, so that it has preferences."""
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    keys = {**SIZES[architecture], positions: LENGTH, "tie_word_embeddings": False}
    net = build_model(
        "clm", architecture, keys, vocab_size=VOCABULARY, sequence_length=LENGTH, special_ids={}, seed=seed
    ).eval()
    net.get_output_embeddings().weight.data *= loud
    return net


def batch(padded: bool = False) -> Batch:
    ids = torch.from_numpy(text(5, 3)).long()[:4]
    mask = torch.ones(4, 1, LENGTH, LENGTH, dtype=torch.bool) if padded else None
    return Batch(Inputs(ids, mask, None), torch.arange(3), torch.arange(3), ids.numel(), np.arange(4))


def go_on(student: Any, teacher: Any, kept: int, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return continued(batch(), student, teacher, kept, VOCABULARY, TOKENIZER.pad_id)


@torch.no_grad()
def ranks(net: Any, found: Batch) -> Tensor:
    """[4, HALF]: by a forward pass over the whole, the rank of each new token in what `net` says before it."""
    logits = net(input_ids=found.inputs.input_ids_BL).logits[:, HALF - 1 : -1, :VOCABULARY].clone()
    logits[..., TOKENIZER.pad_id] = -torch.inf
    own = logits.gather(2, found.inputs.input_ids_BL[:, HALF:, None])
    return (logits > own).sum(2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_and_labels_are_those_of_the_new_half_and_the_old_half_stays(architecture: str) -> None:
    found = go_on(model(architecture, 1), model(architecture, 2), 5)
    ids = found.inputs.input_ids_BL
    assert torch.equal(ids[:, :HALF], batch().inputs.input_ids_BL[:, :HALF])
    assert not torch.equal(ids[:, HALF:], batch().inputs.input_ids_BL[:, HALF:])
    assert torch.equal(ids.flatten()[found.rows_N + 1], found.labels_N)
    assert found.rows_N.tolist() == [b * LENGTH + t for b in range(4) for t in range(HALF - 1, LENGTH - 1)]
    assert bool((ids != TOKENIZER.pad_id).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sure_student_that_the_teacher_may_not_contradict_is_taken_at_its_word(architecture: str) -> None:
    student = model(architecture, 1, loud=1e5)
    found = go_on(student, model(architecture, 2), VOCABULARY)
    assert int(ranks(student, found).max()) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_student_in_training_with_activation_checkpointing_hears_all_that_it_said(architecture: str) -> None:
    student = model(architecture, 1, loud=1e5).train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    found = go_on(student, model(architecture, 2), VOCABULARY)
    assert student.training
    assert int(ranks(student.eval(), found).max()) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_is_among_the_teachers_kept_ones_or_its_own(architecture: str) -> None:
    """A sure teacher draws its first choice: then all tokens rank below what is kept, and some of them first."""
    student, teacher = model(architecture, 1, loud=1.0), model(architecture, 2, loud=1e5)
    found = ranks(teacher, go_on(student, teacher, 8))
    assert int(found.max()) < 8
    assert 0 < int((found == 0).sum()) < found.numel()
    assert int(ranks(teacher, go_on(student, teacher, 1)).max()) == 0


def test_texts_follow_the_seed() -> None:
    models = model("llama", 1, loud=1.0), model("llama", 2, loud=1.0)
    one, same, other = (go_on(*models, 8, seed=seed).inputs.input_ids_BL for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_batch_with_padding_stays_as_it_is() -> None:
    given = batch(padded=True)
    assert continued(given, model("gpt2", 1), model("gpt2", 2), 5, VOCABULARY, TOKENIZER.pad_id) is given


@pytest.fixture(scope="module")
def causal_teacher(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    changes = {"data__task": "clm", "steps": 4, "save__trajectory_every": 4, "log__eval_every": 4}
    distill(["train", *settings(shards, folder / "run", **changes)], folder).ok()
    return folder / "run" / "trajectory"


def speculating(trajectory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data__task": "clm",
        "teacher__trajectory": str(trajectory),
        "objective__weights": {"forward_kl": 1.0},
        "objective__speculate_from": 0.5,
        "objective__speculate_top_k": 5,
        "steps": 8,
        "log__every": 1,
        "micro_batch_size": 4,
        **changes,
    }


def test_run_speculates_from_its_share_on_and_goes_on_to_the_same_bits_after_a_kill(
    shards: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    changes = speculating(causal_teacher, save__every=3)
    distill(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path).ok()
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 6)).code == -9
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")
    plain = {**changes, "objective__speculate_from": 1.0}
    distill(["train", *settings(shards, tmp_path / "plain", **plain)], tmp_path).ok()
    losses = [[row["loss"] for row in rows(tmp_path / name, "train")] for name in ("calm", "plain")]
    same = [a == b for a, b in zip(*losses, strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_more_kept_tokens_than_there_are_are_refused(
    shards: Path, causal_teacher: Path, tmp_path: Path
) -> None:
    changes = speculating(causal_teacher, objective__speculate_top_k=129)
    with pytest.raises(ValueError, match="speculate_top_k is 129, but the vocabulary has 128"):
        train(config(shards, tmp_path / "run", **changes))
