"""Mixed embeddings and picked layers, on real models of every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import LENGTH, SIZES, VOCABULARY, config, distill, settings, text
from transformers import AutoModelForMaskedLM

from distill.build import student_model
from distill.data import Samples
from distill.layer_picking import pick_layers
from distill.models import ARCHITECTURES, Inputs, build_model, counted_rows, mixed_embeddings

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about each other
SPECIALS = {f"{name}_token_id": i for i, name in enumerate(("pad", "unk", "bos", "eos", "cls", "sep"))}
ALL = [(task, name) for task, names in ARCHITECTURES.items() for name in names]


def model(task: str, architecture: str, depth: int = 3, seed: int = 0) -> torch.nn.Module:
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    number = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    keys = {**SIZES[architecture], positions: LENGTH, number: depth}
    return build_model(
        task,
        architecture,
        keys,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        special_ids=SPECIALS,
        seed=seed,
    ).eval()


TOKENS = torch.from_numpy(text(4, 3)).long()
ROWS = torch.arange(0, 4 * LENGTH, 3)


@pytest.mark.parametrize(("task", "architecture"), ALL)
def test_mixture_of_equal_sequences_is_the_sequence(task: str, architecture: str) -> None:
    net = model(task, architecture)
    same = Inputs(TOKENS[:1].expand(3, LENGTH), None, None)
    rows = counted_rows(net, same, ROWS[:20], ["mixed", "layers"])
    torch.testing.assert_close(rows.inside.mixed_ND, rows.hidden_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("task", "architecture"), ALL)
def test_mixture_lies_between_its_sequences_and_leans_to_the_first(task: str, architecture: str) -> None:
    net = model(task, architecture)
    e = net.get_input_embeddings()(TOKENS)
    mixed = mixed_embeddings(net, TOKENS)
    share = ((mixed - e.roll(1, 0))[0] / (e - e.roll(1, 0))[0]).nanmedian()
    assert 0.5 <= float(share) <= 1
    torch.testing.assert_close(mixed, share * e + (1 - share) * e.roll(1, 0), rtol=1e-4, atol=1e-6)
    other = model(task, architecture, seed=1)
    e = other.get_input_embeddings()(TOKENS)  # another model mixes its own in the same way
    torch.testing.assert_close(
        mixed_embeddings(other, TOKENS), share * e + (1 - share) * e.roll(1, 0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(("task", "architecture"), ALL)
def test_picking_all_layers_is_the_model_itself(task: str, architecture: str) -> None:
    net = model(task, architecture)
    same = pick_layers(task, net, [0, 1, 2]).eval()
    assert torch.equal(same(input_ids=TOKENS).logits, net(input_ids=TOKENS).logits)


@pytest.mark.parametrize(("task", "architecture"), ALL)
def test_picked_layers_are_those_of_the_model_in_their_order(task: str, architecture: str) -> None:
    """A layer that is left out of the big model by hand says the same."""
    net = model(task, architecture)
    picked = pick_layers(task, net, [0, 2]).eval()
    assert picked.config.num_hidden_layers == 2
    (stack,) = [m for m in net.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3]
    kinds = getattr(net.config, "layer_types", None)
    del stack[1]
    net.config.num_hidden_layers = 2
    if kinds:
        net.config.layer_types = [kinds[0], kinds[2]]
    found, expected = (
        m(input_ids=TOKENS, use_cache=False).logits if task == "clm" else m(input_ids=TOKENS).logits
        for m in (picked, net)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 0]])
def test_layers_that_are_not_there_or_come_twice_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"different layers of 0 to 2, got"):
        pick_layers("mlm", model("mlm", "bert"), layers)


def test_layer_that_can_not_come_first_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.init_layers=\[1, 2\]: .* can't stand in this order"):
        pick_layers("mlm", model("mlm", "modernbert"), [1, 2])


def test_student_of_a_teachers_layers_trains_and_is_exported(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    final = teacher_run / "trajectory" / "step_00000024"
    changes = {
        "teacher__trajectory": str(teacher_run / "trajectory"),
        "objective__weights": {"forward_kl": 1, "hidden_cosine": 1},
        "model__init_from": str(final),
        "model__init_layers": [1],
        "steps": 2,
    }
    start = student_model(
        config(shards, tmp_path / "x", **changes),
        Samples(config(shards, tmp_path / "x").data, "train", 0, shuffle=False),
    )
    whole = AutoModelForMaskedLM.from_pretrained(final).state_dict()
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(tensor, whole[name.replace("layer.0.", "layer.1.")])
    distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path).ok()
    out = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert out.config.num_hidden_layers == 1
