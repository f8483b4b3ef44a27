"""Gradients by the inputs, of real models: next to one-hot inputs and float64, in real runs, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_equivalence import assert_close_rows, parameters
from tiny import (
    LENGTH,
    SIZES,
    VOCABULARY,
    config,
    distill,
    distill_on_ranks,
    rows,
    settings,
    text,
)
from torch import Tensor

from distill.models import Inputs, Rows, build_model, counted_rows, use_plain_attention
from distill.objectives.input_gradients import kdiga, with_pulls
from distill.objectives.seen import Seen
from distill.train import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed, transformers and torch, about each other
ALL = [("mlm", "bert"), ("clm", "gpt2"), ("clm", "gpt_neox"), ("clm", "llama")]
TOKENS = torch.from_numpy(text(4, 3)).long()
HALF_HIDDEN = torch.ones(4, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
HALF_HIDDEN[:, :, :, 5] = False
HALF_HIDDEN[:, :, 5, 5] = True


def model(task: str, architecture: str, seed: int, dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    net = build_model(
        task,
        architecture,
        {**SIZES[architecture], positions: LENGTH, "initializer_range": 0.3, **keys},
        vocab_size=VOCABULARY + 3,
        sequence_length=LENGTH,
        special_ids={"pad_token_id": VOCABULARY},  # in no text: torch gives padding's embedding no gradient
        seed=seed,
    )
    use_plain_attention(net)
    return net.to(dtype).eval()


def asked(num_rows: int = 40, hidden: bool = False) -> tuple[Inputs, Tensor, Tensor]:
    rows_N = torch.arange(num_rows) * 3
    return Inputs(TOKENS, HALF_HIDDEN if hidden else None, None), rows_N, (rows_N * 7 + 5) % VOCABULARY


def seen(student: Any, teacher: Any, inputs: Inputs, rows_N: Tensor, labels_N: Tensor) -> Seen:
    own, other = (counted_rows(net, inputs, rows_N, ["gradients"]) for net in (student, teacher))
    said = with_pulls(other, labels_N, VOCABULARY)
    return Seen(own, said, labels_N, rows_N // LENGTH, VOCABULARY, chunk_rows=16)


def by_one_hot(net: Any, inputs: Inputs, rows_N: Tensor, labels_N: Tensor) -> Tensor:
    """[B, L, L]: from the whole model on one-hot inputs, whose gradient [B, L, V] is then looked up."""
    one_hot_BLV = torch.nn.functional.one_hot(inputs.input_ids_BL, VOCABULARY + 3).double().requires_grad_()
    mask = inputs.attention_mask
    added = None if mask is None else torch.zeros(mask.shape).double().masked_fill(~mask, -1e300)
    words_BLD = one_hot_BLV @ net.get_input_embeddings().weight
    logits_NV = net(inputs_embeds=words_BLD, attention_mask=added).logits.flatten(0, 1)[rows_N, :VOCABULARY]
    loss = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    (found_BLV,) = torch.autograd.grad(loss, one_hot_BLV, create_graph=True)
    return found_BLV.gather(2, inputs.input_ids_BL[:, None, :].expand(-1, LENGTH, -1))


def expected(student: Any, teacher: Any, *question: Any) -> Tensor:
    own, other = by_one_hot(student, *question), by_one_hot(teacher, *question).detach()
    return (own - other).square().sum() / LENGTH


def gradients(value: Tensor, net: Any) -> list[Tensor]:
    given = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(given, net.parameters(), strict=True)]


@pytest.mark.parametrize("hidden", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("task", "architecture"), ALL)
def test_term_and_its_gradient_are_those_of_one_hot_inputs(
    task: str, architecture: str, hidden: bool
) -> None:
    """Second derivatives by every weight, the embeddings' too; the teacher is wider and of another seed."""
    wide = {"gpt2": "n_embd"}.get(architecture, "hidden_size")
    nets = model(task, architecture, 1), model(task, architecture, 2, **{wide: 48})
    question = asked(hidden=hidden)
    term, value = kdiga(seen(*nets, *question)), expected(*nets, *question)
    torch.testing.assert_close(term, value, rtol=1e-9, atol=0)
    assert float(term.detach()) > 1e-3
    torch.testing.assert_close(gradients(term, nets[0]), gradients(value, nets[0]), rtol=1e-7, atol=1e-9)


def test_derivative_along_a_direction_is_the_difference_of_values() -> None:
    student, teacher, question = model("clm", "gpt2", 1), model("clm", "gpt2", 2), asked()  # all in float64
    gradient = gradients(kdiga(seen(student, teacher, *question)), student)
    direction = [torch.randn(p.shape, dtype=torch.float64) for p in student.parameters()]
    slope = float(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(student.parameters(), direction, strict=True):
                p += step * d
        values.append(float(kdiga(seen(student, teacher, *question)).detach()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(("task", "architecture"), ALL)
def test_activation_checkpointing_changes_nothing(task: str, architecture: str) -> None:
    teacher, question, found = model(task, architecture, 2), asked(), []
    for saves in (False, True):
        student = model(task, architecture, 1).train()
        if saves:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        term = kdiga(seen(student, teacher, *question))
        found.append((term.detach(), gradients(term, student)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = model("mlm", "bert", 1)
    term = kdiga(seen(student, model("mlm", "bert", 1), *asked()))
    assert float(term.detach()) == 0
    assert not any(g.any() for g in gradients(term, student))


def test_no_rows_are_zero_with_a_gradient() -> None:
    student, teacher, question = model("clm", "gpt2", 1), model("clm", "gpt2", 2), asked(0)
    term = kdiga(seen(student, teacher, *question))
    assert float(term.detach()) == 0
    assert not any(g.any() for g in gradients(term, student))


def test_weight_of_zero_reports_the_same_value_and_leaves_the_graph_for_the_others() -> None:
    given = seen(model("clm", "gpt2", 1), model("clm", "gpt2", 2), *asked())
    with torch.no_grad():
        quiet = kdiga(given)
    torch.testing.assert_close(quiet, kdiga(given).detach(), rtol=1e-12, atol=0)
    assert not quiet.requires_grad
    given.student.hidden_ND.sum().backward()


def test_teacher_keeps_no_graph_and_no_gradient() -> None:
    teacher = model("mlm", "bert", 2).requires_grad_(False)
    inputs, rows_N, labels_N = asked()
    said: Rows = with_pulls(
        counted_rows(teacher, inputs, rows_N, ["gradients", "layers", "attentions"]), labels_N, VOCABULARY
    )
    inside = [*said.inside.layers, *said.inside.attentions, said.inside.words_BLD, said.inside.pulls_BLD]
    assert not any(x.requires_grad for x in (said.hidden_ND, *inside))  # type: ignore[union-attr]
    assert all(p.grad is None for p in teacher.parameters())


def test_bf16_is_near_float64() -> None:
    values = []
    for dtype in (torch.float64, torch.bfloat16):
        nets = (model("clm", "llama", seed, dtype) for seed in (1, 2))
        values.append(float(kdiga(seen(*nets, *asked())).detach()))
    assert values[1] == pytest.approx(values[0], rel=0.1)


# ------------------------------------------------------------------------------------------------ runs


def taught(teacher_run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "teacher__trajectory": str(teacher_run / "trajectory"),
        "objective__weights": {"forward_kl": 0.5, "kdiga": 2.0},
        "steps": 6,
        "log__every": 1,
        "optim__eps": 1e-3,
        "optim__clip": 0.05,
        **changes,
    }


@pytest.fixture(scope="module")
def reference(ragged: Path, teacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    keys = taught(teacher_run, engine__zero_stage=0)
    distill(["train", *settings(ragged, folder / "run", **keys)], folder).ok()
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "micro", "stage", "saves"), [(1, 2, 1, False), (2, 2, 2, False), (1, 8, 1, True)]
)
def test_ranks_micro_batches_stages_and_checkpointing_change_nothing(
    ranks: int, micro: int, stage: int, saves: bool, reference: Path, ragged: Path, teacher_run: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    keys = taught(teacher_run, micro_batch_size=micro, engine__zero_stage=stage)
    keys["engine__activation_checkpointing"] = saves
    arguments = ["train", *settings(ragged, tmp_path / "run", **keys)]
    for ended in (
        [distill(arguments, tmp_path)] if ranks == 1 else distill_on_ranks(arguments, tmp_path, ranks)
    ):
        ended.ok()
    assert_close_rows(tmp_path / "run", reference)
    torch.testing.assert_close(parameters(tmp_path / "run"), parameters(reference), rtol=0, atol=5e-6)


def test_gradients_of_a_run_come_nearer_to_the_teachers(
    reference: Path, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    """A run on the same samples that is told of the term only to log it stays further away."""
    weights = {"forward_kl": 0.5, "kdiga": 0.0}
    keys = taught(teacher_run, objective__weights=weights, engine__zero_stage=0)
    distill(["train", *settings(ragged, tmp_path / "run", **keys)], tmp_path).ok()
    apart = [rows(folder, "train") for folder in (reference, tmp_path / "run")]
    first, last = ([run[i]["term_kdiga"] for run in apart] for i in (0, -1))
    assert first[0] == first[1]
    assert last[0] < last[1]


@pytest.mark.parametrize(
    "change", [{"engine__zero_stage": 3}, {"teacher__zero_stage": 3}, {"engine__compile": True}]
)
def test_split_weights_and_compiled_code_are_refused_before_the_first_step(
    change: dict[str, Any], shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"kdiga .*engine.zero_stage to 2 or less, teacher.zero_stage=0"):
        config(shards, tmp_path / "run", **taught(teacher_run, **change))


def test_sliding_windows_are_refused(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    keys = taught(teacher_run, model__architecture="modernbert")
    with pytest.raises(ValueError, match="modernbert has layers with a sliding window"):
        train(config(shards, tmp_path / "run", **keys))
