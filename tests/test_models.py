"""Trunk and head of every supported architecture, attention that keeps documents apart, counts of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LENGTH, SIZES, TOKENIZER, VOCABULARY
from transformers import AutoModelForCausalLM, Gemma2Config

from distill.data import attention
from distill.models import (
    ARCHITECTURES,
    Inputs,
    build_model,
    check_split,
    counted_rows,
    flops_per_step,
    head_of,
    num_parameters,
    work_of,
)
from distill.pretrained import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about each other
TASKS = {name: task for task, names in ARCHITECTURES.items() for name in names}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}


def model(architecture: str, seed: int = 0, **overrides: Any) -> Any:
    task = TASKS[architecture]
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    keys = {**SIZES[architecture], positions: LENGTH, **overrides}
    return build_model(
        task,
        architecture,
        keys,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
        special_ids=SPECIALS,
        seed=seed,
    )


def batch(architecture: str, tokens: np.ndarray, isolated: bool) -> Inputs:
    mask, positions = attention(tokens, TOKENIZER, TASKS[architecture] == "clm", isolated)
    return Inputs(torch.from_numpy(tokens), mask, positions)


@torch.no_grad()
def logits(net: Any, inputs: Inputs) -> torch.Tensor:
    """[B, L, V] through trunk and head."""
    num_rows = inputs.input_ids_BL.numel()
    rows = counted_rows(net, inputs, torch.arange(num_rows))
    return rows.head(rows.hidden_ND).reshape(*inputs.input_ids_BL.shape, -1)


def documents(*lengths: int, seed: int = 0) -> np.ndarray:
    """One sequence [1, LENGTH] of documents of these lengths, then padding."""
    rng = np.random.default_rng(seed)
    tokens = np.full((1, LENGTH), TOKENIZER.pad_id)
    start = 0
    for length in lengths:
        words = rng.integers(5, VOCABULARY, length - 2)
        tokens[0, start : start + length] = [TOKENIZER.bos_id, *words, TOKENIZER.eos_id]
        start += length
    return tokens


@pytest.mark.parametrize("architecture", TASKS)
def test_head_of_trunk_is_the_models_logits(architecture: str) -> None:
    net = model(architecture).eval()
    tokens = documents(LENGTH)
    with torch.no_grad():
        whole = net(input_ids=torch.from_numpy(tokens)).logits
    torch.testing.assert_close(logits(net, batch(architecture, tokens, False)), whole)


@pytest.mark.parametrize("architecture", TASKS)
def test_rows_are_chosen_from_the_flattened_positions(architecture: str) -> None:
    net = model(architecture).eval()
    tokens = np.concatenate([documents(LENGTH), documents(20, 12, seed=1)])
    inputs = batch(architecture, tokens, True)
    chosen = torch.tensor([0, 31, 32, 63, 40])
    with torch.no_grad():
        rows = counted_rows(net, inputs, chosen)
        found = rows.head(rows.hidden_ND)
    torch.testing.assert_close(found, logits(net, inputs).flatten(0, 1)[chosen])


@pytest.mark.parametrize("architecture", TASKS)
def test_isolated_document_does_not_see_its_neighbours(architecture: str) -> None:
    """Its logits stay when another document takes its neighbours' places, and are those it has alone."""
    net = model(architecture).eval()
    one = documents(10, 12, 8)
    other = documents(10, 12, 8, seed=1)
    other[:, 10:22] = one[:, 10:22]
    alone = documents(12)
    alone[:, :12] = one[:, 10:22]
    first, second = (logits(net, batch(architecture, tokens, True))[0, 10:22] for tokens in (one, other))
    by_itself = logits(net, batch(architecture, alone, True))[0, :12]
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, by_itself)


@pytest.mark.parametrize("architecture", TASKS)
def test_documents_that_are_not_isolated_do_see_each_other(architecture: str) -> None:
    net = model(architecture).eval()
    one, other = documents(16, 16), documents(16, 16, seed=1)
    other[:, 16:] = one[:, 16:]
    first, second = (logits(net, batch(architecture, tokens, False))[0, 16:] for tokens in (one, other))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("architecture", TASKS)
@pytest.mark.parametrize("isolated", [False, True])
def test_padding_and_rows_of_padding_change_no_other_logits(architecture: str, isolated: bool) -> None:
    net = model(architecture).eval()
    short = documents(9)[:, :9]
    longer = np.concatenate([documents(9), np.full((1, LENGTH), TOKENIZER.pad_id)])
    longer[0, :9] = short[0]
    expected = logits(net, batch(architecture, short, isolated))[0]
    found = logits(net, batch(architecture, longer, isolated))
    torch.testing.assert_close(found[0, :9], expected)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_causal_models_do_not_look_ahead(architecture: str) -> None:
    net = model(architecture).eval()
    one, other = documents(16, 16), documents(16, 16)
    other[:, 20:30] = 77
    for isolated in (False, True):
        first, second = (logits(net, batch(architecture, t, isolated))[0, :20] for t in (one, other))
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("architecture", TASKS)
def test_weights_are_a_function_of_the_seed_alone(architecture: str) -> None:
    torch.manual_seed(123)
    one = model(architecture, seed=5).state_dict()
    torch.manual_seed(321)
    state = torch.get_rng_state()
    two, other = model(architecture, seed=5).state_dict(), model(architecture, seed=6).state_dict()
    assert (torch.get_rng_state() == state).all()  # and building disturbs nobody else's
    assert all((one[name] == two[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize("architecture", TASKS)
def test_new_models_have_no_dropout(architecture: str) -> None:
    net = model(architecture).train()
    inputs = batch(architecture, documents(LENGTH), False)
    torch.testing.assert_close(logits(net, inputs), logits(net, inputs), rtol=0, atol=0)


def test_split_is_checked_though_the_model_drops_out_and_its_mode_stays() -> None:
    net = model("bert", hidden_dropout_prob=0.5).train()
    check_split(net)
    assert net.training


def test_softcap_of_a_model_is_part_of_its_head() -> None:
    keys = {"vocab_size": VOCABULARY, "head_dim": 16, "num_key_value_heads": 2, **SIZES["llama"]}
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(Gemma2Config(**keys, final_logit_softcapping=0.05))
    check_split(net)
    assert head_of(net).softcap == 0.05
    said = logits(net.eval(), Inputs(torch.arange(8).unsqueeze(0), None, None))
    assert 0.01 < said.abs().max() < 0.05


@pytest.mark.parametrize("architecture", TASKS)
def test_head_is_the_final_layers_own_weights(architecture: str) -> None:
    net = model(architecture)
    head = head_of(net)
    assert head.weight_VD is net.get_output_embeddings().weight
    assert head.bias_V is net.get_output_embeddings().bias
    assert head.weight_VD.shape == (VOCABULARY, 32)


def test_model_that_changes_its_logits_after_the_head_is_refused() -> None:
    net = model("llama")
    net.lm_head.register_forward_hook(lambda *_: torch.zeros(1, 8, VOCABULARY))
    forward = type(net).forward

    def capped(self: Any, *args: Any, **keys: Any) -> Any:
        output = forward(self, *args, **keys)
        output.logits = 30 * torch.tanh(output.logits / 30) + 1
        return output

    net.forward = capped.__get__(net)
    with pytest.raises(ValueError, match=r"the logits are not head\(trunk\(x\)\)"):
        check_split(net)


def test_model_without_a_final_linear_layer_is_refused() -> None:
    net = model("llama")
    net.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="llama has no linear layer that makes its logits"):
        check_split(net)


def test_scale_that_is_left_out_is_seen_in_logits_of_any_size() -> None:
    for size in (1e-4, 1.0, 1e4):
        net = model("llama", tie_word_embeddings=False)
        net.lm_head.weight.data *= size
        check_split(net)
        forward = net.forward

        def scaled(*args: Any, forward: Any = forward, **keys: Any) -> Any:
            output = forward(*args, **keys)
            output.logits = 1.05 * output.logits
            return output

        net.forward = scaled
        with pytest.raises(ValueError, match=r"the logits are not head\(trunk\(x\)\)"):
            check_split(net)


@pytest.mark.parametrize(
    ("task", "architecture", "overrides", "said"),
    [
        ("mlm", "bort", {}, "model.architecture='bort' does not serve task mlm; supported: bert, modernbert"),
        ("mlm", "gpt2", {}, "does not serve task mlm"),
        (
            "mlm",
            "bert",
            {"hiden_size": 32},
            "model.overrides.hiden_size is no key of BertConfig; did you mean hidden_size?",
        ),
        ("clm", "gpt2", {"n_positions": 16}, "n_positions is 16, but the shards hold sequences of 32 tokens"),
        ("clm", "llama", {"max_position_embeddings": 31}, "max_position_embeddings is 31"),
    ],
)
def test_model_that_can_not_be_is_refused(
    task: str, architecture: str, overrides: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        build_model(
            task,
            architecture,
            overrides,
            vocab_size=VOCABULARY,
            sequence_length=LENGTH,
            special_ids={},
            seed=0,
        )
    assert said in str(caught.value)


def test_folder_that_is_no_model_of_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be loaded as a mlm model"):
        load_model("mlm", tmp_path, torch.float32, LENGTH)
    model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama"):
        load_model("mlm", tmp_path / "llama", torch.float32, LENGTH)
    model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match="max_position_embeddings is 32, but the shards hold sequences of 33"
    ):
        load_model("mlm", tmp_path / "bert", torch.float32, LENGTH + 1)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_of_other_sizes_than_the_config_says_are_named(tmp_path: Path) -> None:
    model("bert").save_pretrained(tmp_path / "bert")
    edit_config(tmp_path / "bert", intermediate_size=48)
    with pytest.raises(ValueError) as caught:
        load_model("mlm", tmp_path / "bert", torch.float32, LENGTH)
    said = "bert.encoder.layer.0.intermediate.dense.bias is [64] in the weights and [48] by config.json"
    assert f"{tmp_path / 'bert'}: {said} (6 weights differ so)" in str(caught.value)


def test_folder_that_brings_its_own_code_is_refused_without_running_it(tmp_path: Path) -> None:
    model("llama").save_pretrained(tmp_path / "llama")
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(tmp_path / "llama", model_type="own", auto_map=names)
    (tmp_path / "llama" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="llama can't be loaded as a clm model"):
        load_model("clm", tmp_path / "llama", torch.float32, LENGTH)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, None])
def test_weights_that_can_not_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    model("bert").save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="bert can't be loaded as a mlm model"):
        load_model("mlm", tmp_path / "bert", torch.float32, LENGTH)


@pytest.mark.parametrize("architecture", TASKS)
def test_flops_follow_the_weights_that_a_token_meets(architecture: str) -> None:
    """By hand: 2 * (weights of the blocks) a token, 4 * length * width a layer and token, 2 * weights of the head a row."""
    net = model(architecture)
    blocks = [
        m for n, m in net.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    in_head = [
        m
        for m in blocks
        if any(x in name_of(net, m) for x in ("cls", "decoder", "head.", "lm_head", "embed_out"))
    ]
    trunk = sum(m.weight.numel() for m in blocks if m not in in_head)
    head = sum(m.weight.numel() for m in in_head)
    layers = net.config.num_hidden_layers
    expected = 2.0 * 100 * trunk + 4.0 * 100 * LENGTH * 32 * layers + 2.0 * 15 * head
    assert flops_per_step(work_of(net), 100, 15, LENGTH, backward=False) == expected
    assert flops_per_step(work_of(net), 100, 15, LENGTH, backward=True) == 3 * expected


def name_of(net: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(name for name, module in net.named_modules() if module is wanted)


def test_tied_weights_are_counted_once() -> None:
    untied = num_parameters(model("llama", tie_word_embeddings=False))
    assert untied - num_parameters(model("llama", tie_word_embeddings=True)) == 32 * VOCABULARY
