"""The warm-up on pairs of texts: who said which word, the loss next to its equation, real runs, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_speculative import ARCHITECTURES, HALF, batch, model, ranks, speculating
from tiny import LENGTH, TOKENIZER, VOCABULARY, Kill, assert_same_run, config, distill, rows, settings
from torch import Tensor

from distill.data import Batch
from distill.models import counted_rows
from distill.objectives.preferences import preference
from distill.objectives.seen import Seen
from distill.speculative import continued, corrected_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed, transformers and torch, about each other


def pairs(student: Any, teacher: Any, kept: int = 8, reference: Any = None) -> Batch:
    torch.manual_seed(0)
    return corrected_pairs(
        batch(), student, teacher, reference or student, kept, VOCABULARY, TOKENIZER.pad_id
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_text_is_the_students_own_and_the_first_has_the_teachers_best_in_place_of_poor_words(
    architecture: str,
) -> None:
    student, teacher = model(architecture, 1, loud=1.0), model(architecture, 2)
    ids = pairs(student, teacher).inputs.input_ids_BL
    better, own = ids.chunk(2)
    torch.manual_seed(0)
    alone = continued(batch(), student, None, 8, VOCABULARY, TOKENIZER.pad_id)
    assert torch.equal(own, alone.inputs.input_ids_BL)
    poor = ranks(teacher, alone) >= 8
    assert 0 < int(poor.sum()) < poor.numel()
    with torch.no_grad():
        said = teacher(input_ids=own).logits[:, HALF - 1 : -1, :VOCABULARY]
    said[..., TOKENIZER.pad_id] = -torch.inf
    assert torch.equal(better[:, HALF:], torch.where(poor, said.argmax(-1), own[:, HALF:]))
    assert torch.equal(better[:, :HALF], own[:, :HALF])


def test_rows_and_labels_are_those_of_both_new_halves() -> None:
    found = pairs(model("gpt2", 1), model("gpt2", 2))
    ids = found.inputs.input_ids_BL
    assert torch.equal(ids.flatten()[found.rows_N + 1], found.labels_N)
    assert found.rows_N.tolist() == [b * LENGTH + t for b in range(8) for t in range(HALF - 1, LENGTH - 1)]


def test_teacher_that_finds_nothing_poor_leaves_pairs_of_the_same_text() -> None:
    better, own = pairs(model("gpt2", 1), model("gpt2", 2), kept=VOCABULARY).inputs.input_ids_BL.chunk(2)
    assert torch.equal(better, own)


def test_reference_says_how_likely_the_words_were() -> None:
    reference = model("llama", 3)
    found = pairs(model("llama", 1), model("llama", 2), reference=reference)
    with torch.no_grad():
        log_p = reference(input_ids=found.inputs.input_ids_BL).logits[..., :VOCABULARY].log_softmax(-1)
    expected = log_p.flatten(0, 1)[found.rows_N].gather(1, found.labels_N[:, None]).squeeze(1)
    torch.testing.assert_close(found.reference_N, expected)


def test_batch_with_padding_stays_as_it_is_and_has_no_preference() -> None:
    given = batch(padded=True)
    net = model("gpt2", 1)
    assert corrected_pairs(given, net, net, net, 5, VOCABULARY, TOKENIZER.pad_id) is given
    own = counted_rows(net, given.inputs._replace(attention_mask=None), given.rows_N)
    assert float(preference(Seen(own, own, given.labels_N, torch.zeros(3).long(), VOCABULARY)).detach()) == 0


# ------------------------------------------------------------------------------------------------ loss


def seen(student: Any, found: Batch, reference_N: Tensor) -> Seen:
    own = counted_rows(student, found.inputs, found.rows_N)
    said = own._replace(inside=own.inside._replace(reference_N=reference_N))
    return Seen(own, said, found.labels_N, found.rows_N // LENGTH, VOCABULARY, chunk_rows=50)


def test_loss_and_its_gradient_follow_the_equation() -> None:
    student, reference = model("gpt2", 1, loud=2.0).double(), model("gpt2", 3).double()
    found = pairs(student, model("gpt2", 2).double())

    def text_log_p(net: Any) -> Tensor:
        log_p = net(input_ids=found.inputs.input_ids_BL).logits[..., :VOCABULARY].log_softmax(-1)
        words = found.inputs.input_ids_BL[:, HALF:]
        return log_p[:, HALF - 1 : -1].gather(2, words[..., None]).sum((1, 2))

    with torch.no_grad():
        log_p = reference(input_ids=found.inputs.input_ids_BL).logits[..., :VOCABULARY].log_softmax(-1)
        old = text_log_p(reference)
    told = log_p.flatten(0, 1)[found.rows_N].gather(1, found.labels_N[:, None]).squeeze(1)
    value = preference(seen(student, found, told), beta=0.3)
    gain = text_log_p(student) - old
    expected = torch.tensor(0.0)
    for better, own in zip(gain[:4], gain[4:], strict=True):
        expected = expected + (1 + (-0.3 * (better - own)).exp()).log() * 2 * HALF
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    both = [torch.autograd.grad(x, list(student.parameters())) for x in (value, expected)]
    torch.testing.assert_close(*both, rtol=1e-7, atol=1e-9)


def test_step_down_the_gradient_makes_the_corrected_text_the_likelier_one() -> None:
    student = model("gpt2", 1, loud=2.0)
    found = pairs(student, model("gpt2", 2))
    assert found.reference_N is not None
    before = preference(seen(student, found, found.reference_N))
    assert float(before.detach()) == pytest.approx(math.log(2) * len(found.rows_N), rel=1e-5)
    before.backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 1e-4 * p.grad
        assert float(preference(seen(student, found, found.reference_N))) < float(before)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def grown(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal run with its trajectory and its model."""
    folder = tmp_path_factory.mktemp("causal")
    changes = {"data__task": "clm", "steps": 4, "save__trajectory_every": 4, "log__eval_every": 4}
    distill(["train", *settings(shards, folder / "run", **changes)], folder).ok()
    return folder / "run"


def warming(run: Path, **changes: Any) -> dict[str, Any]:
    weights = {"preference": [[0, 1.0], [0.5, 1.0], [0.5, 0.0]], "forward_kl": [[0.5, 0.0], [0.5, 1.0]]}
    return speculating(
        run / "trajectory",
        **{
            "model__init_from": str(run / "model"),
            "objective__weights": weights,
            "objective__speculate_from": 0.75,
            **changes,
        },
    )


def test_run_warms_up_then_learns_then_speculates_and_goes_on_to_the_same_bits_after_a_kill(
    shards: Path, grown: Path, tmp_path: Path
) -> None:
    changes = warming(grown, save__every=2)
    distill(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path).ok()
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 4)).code == -9
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")
    said = [row["term_preference"] for row in rows(tmp_path / "calm", "train")]
    assert said[0] == pytest.approx(math.log(2), rel=1e-4)
    assert 0 not in said[:4] and said[1] != said[0]
    assert said[4:] == [0] * 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model__init_from": ""}, "preference warms up a student that can write: set model.init_from"),
        ({"data__task": "mlm"}, "preference lets the student go on with a text: it needs data.task=clm"),
        ({"engine__zero_stage": 3}, "preference runs both models many times a step"),
        ({"objective__weights": {"preference": 1.0}}, "gives weight to preference alone"),
        (
            {"objective__weights": {"preference": [[0, 1], [0.5, 0]], "hard": [[0.4, 0], [1, 1]]}},
            "preference: while it has weight the labels are the student's own words",
        ),
    ],
)
def test_warm_up_that_can_not_be_is_refused(
    change: dict[str, Any], sentence: str, shards: Path, grown: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(shards, tmp_path / "run", **warming(grown, **change))
