"""Units close by importance on a cubic schedule, and the model cut to those left says what the gated one said."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_objectives_mixed import SPECIALS, TOKENS
from tiny import LENGTH, SIZES, VOCABULARY
from transformers import PreTrainedModel

from distill.config import PRUNED, Config
from distill.distributed import World
from distill.models import ARCHITECTURES, AUTO, build_model
from distill.pruning import SMOOTHING, Pruning, close_least, units_left
from distill.units import PLACES, Units, without_closed

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about each other
ALONE = World(0, 1, 0, torch.device("cpu"))
CASES = [(task, name, "ffn") for task, names in ARCHITECTURES.items() for name in names]
CASES.append(("clm", "llama", "heads"))
WAYS = {"query heads that share": (8, 4), "each its own": (4, 4), "size told apart": (4, 4)}


def model(task: str, architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Biases and norms are random too: where they are 0 or 1, a wrong cut of them would not show."""
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    keys = {**SIZES[architecture], positions: LENGTH, **changes}
    if architecture == "llama":
        keys = {"num_attention_heads": 8, "mlp_bias": True, "attention_bias": True, **keys, **changes}
        keys |= {"num_attention_heads": 8, "num_key_value_heads": 4} if not changes else {}
    if architecture == "modernbert":
        keys["mlp_bias"] = True
    built = build_model(
        task, architecture, keys, vocab_size=VOCABULARY, sequence_length=LENGTH, special_ids=SPECIALS, seed=seed
    )  # fmt: skip
    torch.manual_seed(seed)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def settings(**to: float) -> Config:
    config = Config(steps=20)
    config.model.prune_to = to
    config.optim.warmup_share, config.model.prune_until = 0.1, 0.7
    return config


def close_at_random(units: Units, left: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    close_least(units, torch.rand_like(units.gates_LU), left)


def logits(net: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=TOKENS).logits


def loss_of(net: PreTrainedModel) -> torch.Tensor:
    said = net(input_ids=TOKENS).logits
    return torch.nn.functional.cross_entropy(said.flatten(0, 1), TOKENS.roll(1, 1).flatten())


def read_by(net: PreTrainedModel, units: Units) -> list[torch.nn.Module]:
    """The projections that read the units, found without `Units`: by what they are called at the end of a layer."""
    name = PLACES[units.kind][net.config.model_type].read
    found = [m for n, m in net.named_modules() if n.endswith(name) and "attention.output" not in n]
    assert len(found) == net.config.num_hidden_layers
    return found


# ------------------------------------------------------------------------------------------------ schedule


def test_all_units_stay_until_the_start_and_the_final_number_is_reached_at_the_end() -> None:
    def left(share: float) -> int:
        return units_left(1000, 300, share, start=0.1, until=0.6)

    assert [left(s) for s in (0.0, 0.05, 0.1)] == [1000] * 3
    assert [left(s) for s in (0.6, 0.61, 1.0)] == [300] * 3
    for tenth in range(11):
        x = Fraction(tenth, 10)
        exact = 300 + 700 * (1 - x) ** 3
        assert abs(left(0.1 + 0.5 * tenth / 10) - exact) <= Fraction(51, 100)


@given(st.integers(1, 5000), st.data())
def test_units_never_come_back_and_never_fall_below_the_final_number(
    number: int, data: st.DataObject
) -> None:
    final = data.draw(st.integers(1, number))
    start = data.draw(st.floats(0, 0.9))
    until = data.draw(st.floats(start + 0.01, 1))
    left = [units_left(number, final, step / 50, start, until) for step in range(51)]
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (number, final)


# ------------------------------------------------------------------------------------------------ cut


@pytest.mark.parametrize(("task", "architecture", "kind"), CASES)
def test_model_without_closed_units_opens_smaller_and_says_what_the_gated_one_says(
    task: str, architecture: str, kind: str, tmp_path: Path
) -> None:
    net = model(task, architecture)
    whole = logits(net)
    units = Units(net, kind)
    assert torch.equal(logits(net), whole)  # a gate of 1 changes no bit
    before = sum(p.numel() for p in net.parameters())
    close_at_random(units, units.number // 2)
    gated = logits(net)
    assert (gated - whole).abs().max() > 0.05
    without_closed(net, net.state_dict(), [units]).save_pretrained(tmp_path)
    small, report = AUTO[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    key = {
        "heads": "num_key_value_heads",
        "ffn": "n_inner" if architecture == "gpt2" else "intermediate_size",
    }
    assert getattr(small.config, key[kind]) == units.number // 2
    assert sum(p.numel() for p in small.parameters()) < before
    torch.testing.assert_close(logits(small.eval()), gated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_groups_of_heads_are_cut_with_the_key_and_value_head_that_they_share(
    way: str, tmp_path: Path
) -> None:
    heads, groups = WAYS[way]
    changes = {"num_attention_heads": heads, "num_key_value_heads": groups}
    if way == "size told apart":
        changes["head_dim"] = 6  # 4 heads of 6 in a width of 32
    net = model("clm", "llama", **changes)
    units = Units(net, "heads")
    close_at_random(units, 2)
    without_closed(net, net.state_dict(), [units]).save_pretrained(tmp_path)
    small = AUTO["clm"].from_pretrained(tmp_path).eval()
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2 * heads // groups, 2)
    assert small.config.head_dim == net.config.head_dim
    torch.testing.assert_close(logits(small), logits(net), rtol=1e-4, atol=1e-4)


def test_both_kinds_can_be_cut_at_once_and_the_settings_of_generation_stay(tmp_path: Path) -> None:
    net = model("clm", "llama")
    net.generation_config.max_new_tokens = 17
    kinds = [Units(net, "ffn"), Units(net, "heads")]
    close_at_random(kinds[0], 1)
    close_at_random(kinds[1], 1)
    without_closed(net, net.state_dict(), kinds).save_pretrained(tmp_path)
    small = AUTO["clm"].from_pretrained(tmp_path).eval()
    assert small.generation_config.max_new_tokens == 17
    torch.testing.assert_close(logits(small), logits(net), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ importance


@pytest.mark.parametrize(("task", "architecture", "kind"), CASES)
def test_importance_is_weight_times_gradient_of_all_weights_that_read_the_unit(
    task: str, architecture: str, kind: str
) -> None:
    """The gates' fp32 against the weights' own gradients, of a copy in float64 without gates."""
    net = model(task, architecture)
    exact = copy.deepcopy(net).double()
    units = Units(net, kind)
    loss_of(net).backward()
    loss_of(exact).backward()
    expected = []
    for module in read_by(exact, units):
        assert module.weight.grad is not None
        product = (module.weight * module.weight.grad).detach()
        by_input = product.sum(1 if architecture == "gpt2" else 0)
        expected.append(by_input.view(units.number, -1).sum(1))
    torch.testing.assert_close(
        units.take_gradient().double(), torch.stack(expected), rtol=1e-3, atol=1e-5
    )  # fmt: skip


def test_gradients_of_micro_batches_add_up_and_are_taken_once() -> None:
    net = model("clm", "gpt2")
    units = Units(net, "ffn")
    loss_of(net).backward()
    once = units.take_gradient()
    for _ in range(2):
        loss_of(net).backward()
    torch.testing.assert_close(units.take_gradient(), 2 * once)
    with pytest.raises(RuntimeError):  # nothing was learned since
        units.take_gradient()


def test_weights_of_closed_units_get_no_gradient() -> None:
    net = model("mlm", "bert")
    units = Units(net, "ffn")
    close_at_random(units, 40)
    loss_of(net).backward()
    for layer, gates in zip(net.bert.encoder.layer, units.gates_LU, strict=True):
        for gradient in (layer.intermediate.dense.weight.grad, layer.output.dense.weight.grad.T):
            assert not gradient[gates == 0].any()
            assert (gradient[gates == 1] != 0).any(dim=1).all()


def test_least_important_open_units_of_each_layer_go_and_closed_ones_stay_closed() -> None:
    units = Units(model("mlm", "bert"), "ffn")
    importance = torch.stack([torch.arange(64.0), torch.arange(64.0).flip(0)])
    close_least(units, importance, 60)
    assert units.left == 60
    assert [g.nonzero().flatten().tolist() for g in 1 - units.gates_LU] == [[0, 1, 2, 3], [60, 61, 62, 63]]
    importance[:, :4] = 99.0  # too late for those of the first layer
    close_least(units, importance, 58)
    closed = [set(g.nonzero().flatten().tolist()) for g in 1 - units.gates_LU]
    assert closed == [{0, 1, 2, 3, 4, 5}, {58, 59, 60, 61, 62, 63}]


def test_units_without_any_gradient_go_in_a_fixed_order() -> None:
    units = Units(model("mlm", "bert"), "ffn")
    close_least(units, torch.zeros(2, 64), 10)
    assert units.gates_LU.nonzero()[:, 1].tolist() == [*range(10), *range(10)]


def test_whole_run_of_decisions_is_that_of_an_independent_transcription() -> None:
    net = model("clm", "gpt2")
    pruning = Pruning(net, settings(ffn=0.3))
    (units,) = pruning._kinds
    rng = np.random.default_rng(0)
    importance, is_open = np.zeros((2, 128)), np.ones((2, 128), dtype=bool)
    for step in range(1, 21):
        gradient = rng.normal(size=(2, 128)).astype(np.float32)
        for gate, row in zip(units._gates, torch.from_numpy(gradient), strict=True):
            gate.grad = row.clone()
        pruning.step(ALONE)
        importance = SMOOTHING * importance + (1 - SMOOTHING) * np.abs(gradient) * is_open
        x = Fraction(min(max(step - 2, 0), 12), 12)  # from 10 % to 70 % of 20 steps
        due = 38 + round(90 * (1 - x) ** 3)
        for row, opened in zip(importance, is_open, strict=True):
            alive = np.flatnonzero(opened)
            opened[alive[np.argsort(row[alive])][: len(alive) - due]] = False
        assert np.array_equal(units.gates_LU.numpy() == 1, is_open), step
        assert pruning.left == {"ffn_left": due}
    assert pruning.left == {"ffn_left": 38}


def test_heads_go_only_to_numbers_that_a_config_can_have() -> None:
    pruning = Pruning(model("clm", "llama"), settings(heads=0.25))  # 3 groups of 2 heads do not divide 32
    (units,) = pruning._kinds
    seen = []
    for _ in range(20):
        for gate in units._gates:
            gate.grad = torch.ones_like(gate)
        pruning.step(ALONE)
        seen.append(units.left)
    assert sorted(set(seen), reverse=True) == [4, 2, 1]
    assert seen == sorted(seen, reverse=True)


# ------------------------------------------------------------------------------------------------ state, bad input


def test_what_was_saved_decides_all_that_follows(tmp_path: Path) -> None:
    def steps(pruning: Pruning, first: int, last: int) -> None:
        for step in range(first, last):
            for units in pruning._kinds:
                for gate in units._gates:
                    gate.grad = torch.randn(gate.shape, generator=torch.Generator().manual_seed(step))
            pruning.step(ALONE)

    calm, killed, again = (Pruning(model("clm", "llama"), settings(ffn=0.25, heads=0.5)) for _ in range(3))
    steps(calm, 0, 20)
    steps(killed, 0, 8)
    killed.save(tmp_path)
    again.load(tmp_path)
    assert again.left == killed.left != calm.left
    steps(again, 8, 20)
    for found, expected in zip(again._kinds, calm._kinds, strict=True):
        assert torch.equal(found.gates_LU, expected.gates_LU)


def test_nothing_pruned_means_no_file_no_gate_and_the_model_itself(tmp_path: Path) -> None:
    net = model("mlm", "bert")
    pruning = Pruning(net, settings())
    pruning.step(ALONE)
    pruning.save(tmp_path)
    pruning.load(tmp_path)
    assert not list(tmp_path.iterdir())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert pruning.cut(net, {"a": torch.ones(1)}) == (net, {"a": torch.ones(1)})


def test_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    Pruning(model("mlm", "bert"), settings(ffn=0.5)).save(tmp_path)
    other = Pruning(model("mlm", "bert", intermediate_size=48), settings(ffn=0.5))
    with pytest.raises(ValueError, match=r"gates of \[2, 64\] layers and units, the model has \[2, 48\]"):
        other.load(tmp_path)
    heads = Pruning(model("clm", "llama"), settings(heads=0.5))
    with pytest.raises(KeyError, match="heads"):
        heads.load(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "to", "said"),
    [
        ("gpt2", {"heads": 0.5}, r"prune_to.heads is not for gpt2, only for llama: leave it out"),
        ("gpt2", {"ffn": 0.001}, r"prune_to.ffn=0.001 leaves 0 of 128 in each layer; .* can have 1 to 128"),
        ("llama", {"heads": 0.75}, r"leaves 3 of 4 in each layer; a llama .* can have one of \[1, 2, 4\]"),
    ],
)
def test_what_a_model_can_not_be_pruned_to_is_refused(
    architecture: str, to: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Pruning(model("clm", architecture), settings(**to))


def test_model_that_nobody_has_looked_into_is_refused() -> None:
    unknown: Any = SimpleNamespace(config=SimpleNamespace(model_type="opt"))
    with pytest.raises(ValueError, match=r"prune_to.ffn is not for opt, only for bert, modernbert, gpt2"):
        Units(unknown, "ffn")


def test_every_architecture_has_a_place_and_every_kind_a_name() -> None:
    assert tuple(PLACES) == PRUNED
    assert set(PLACES["ffn"]) == {name for names in ARCHITECTURES.values() for name in names}
