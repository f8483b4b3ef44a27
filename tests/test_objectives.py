"""What is minimised: only rows that count, weights that follow their ramps, a teacher that equals labels or student."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import LENGTH, SIZES, TOKENIZER, VOCABULARY, text
from torch import Tensor

from distill.config import DataConfig, ObjectiveConfig
from distill.data import IGNORE, attention, mask_tokens, next_tokens
from distill.kernels import Head, divergence
from distill.models import Inputs, Rows, build_model, counted_rows
from distill.objectives import Objective, hard_labels, weights_at
from distill.objectives.terms import TERMS

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and torch, about each other


def logits(seed: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def rows_of(logits_NV: Tensor) -> Rows:
    """Rows whose hidden states are their logits."""
    return Rows(logits_NV, Head(torch.eye(VOCABULARY)))


def objective(share: float = 0.0, **keys: Any) -> Any:
    return Objective(ObjectiveConfig(**keys), VOCABULARY, share)


LABELS = torch.arange(12) + 5


def test_weights_and_temperature_follow_their_ramps() -> None:
    config = ObjectiveConfig(
        weights={"forward_kl": [[0, 1.0], [1, 0.0]], "hard": 0.25}, temperature=[[0, 2.0], [1, 1.0]]
    )
    for share in (0.0, 0.5, 1.0):
        assert weights_at(config, share) == {"forward_kl": 1 - share, "hard": 0.25}
        found = Objective(config, VOCABULARY, share)(rows_of(logits(1)), rows_of(logits(2)), LABELS)
        expected = divergence(
            logits(1), logits(2), LABELS, soft_weight=1 - share, hard_weight=0.25, temperature=2 - share
        )
        assert found == expected


def test_chunks_of_rows_are_summed() -> None:
    whole = objective(weights={"forward_kl": 1.0, "hard": 1.0})(
        rows_of(logits(1)), rows_of(logits(2)), LABELS
    )
    parts = objective(weights={"forward_kl": 1.0, "hard": 1.0}, chunk_rows=5)(
        rows_of(logits(1)), rows_of(logits(2)), LABELS
    )
    assert int(parts.num_rows) == int(whole.num_rows) == 12
    for name in ("loss", "soft", "soft_ce", "hard"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_divergence_is_the_one_that_the_weights_name(kind: str) -> None:
    found = objective(weights={kind: 0.5, "hard": 0.25}, beta=0.3, temperature=2.0, temperature_on="both")(
        rows_of(logits(1)), rows_of(logits(2)), LABELS
    )
    expected = divergence(
        logits(1), logits(2), LABELS, kind=kind, beta=0.3, soft_weight=0.5, hard_weight=0.25,
        temperature=2.0, temperature_on="both",
    )  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_two_divergences_in_one_pass_are_refused() -> None:
    with pytest.raises(
        ValueError, match="one divergence from the teacher at a time, got jsd and tvd: keep one"
    ):
        objective(weights={"jsd": 1.0, "hard": 1.0, "tvd": 1.0})(
            rows_of(logits(1)), rows_of(logits(2)), LABELS
        )


def test_terms_are_added_with_their_weights_and_told_without_them() -> None:
    weights = {"hard": 0.5, "rld": [[0, 0.0], [1, 2.0]], "double": 0.25}
    found = objective(0.5, weights=weights)(rows_of(logits(1)), rows_of(logits(2)), LABELS)
    plain = divergence(logits(1), logits(2), LABELS, soft_weight=0.0, hard_weight=0.5)
    rld, double = found.terms_K.tolist()
    assert found.loss.item() == pytest.approx(plain.loss.item() + 1.0 * rld + 0.25 * double, rel=1e-6)
    assert found.soft.item() == pytest.approx(
        plain.soft.item(), rel=1e-6
    )  # told though nothing is learnt from it


def test_divergence_is_told_without_a_gradient_where_no_fused_objective_is_named() -> None:
    student = logits(1).requires_grad_()
    found = objective(weights={"atkd": 1.0})(rows_of(student), rows_of(logits(2)), LABELS)
    expected = divergence(logits(1), logits(2), LABELS)
    for key in ("soft", "soft_ce", "num_correct", "num_rows"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key))
    assert found.loss.item() == pytest.approx(found.terms_K.item(), rel=1e-6)
    assert torch.autograd.grad(found.loss, student)[0].abs().max() > 0


def test_weight_of_zero_switches_a_term_off_that_is_infinite_and_tells_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    infinite = TERMS["rld"]._replace(function=lambda seen: seen.student.hidden_ND.sum() * torch.inf)
    monkeypatch.setitem(TERMS, "rld", infinite)
    student = logits(1).requires_grad_()
    weights = {"hard": 1.0, "rld": [[0, 0.0], [1, 1.0]]}
    found = objective(weights=weights)(rows_of(student), rows_of(logits(2)), LABELS)
    assert torch.autograd.grad(found.loss, student)[0].isfinite().all()
    assert found.loss.isfinite()
    assert not found.terms_K.isfinite().any()


def test_validation_is_hard_labels_whatever_trains() -> None:
    config = ObjectiveConfig(weights={"jsd": 1.0}, temperature=0.0, beta=1.0)
    found = hard_labels(config, VOCABULARY)(rows_of(logits(1)), None, LABELS)
    torch.testing.assert_close(
        found.loss, torch.nn.functional.cross_entropy(logits(1), LABELS, reduction="sum")
    )


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_kl_and_its_gradient_are_zero_where_student_and_teacher_agree(kernel: str) -> None:
    student = logits(1).requires_grad_()
    terms = objective(weights={"forward_kl": 1.0}, kernel=kernel)(
        rows_of(student), rows_of(logits(1)), LABELS
    )
    terms.loss.backward()
    assert float(terms.soft) == pytest.approx(0, abs=1e-5)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_hard_labels_are_the_cold_limit_of_a_teacher_that_is_always_right(
    kernel: str, temperature: float
) -> None:
    right = rows_of(torch.nn.functional.one_hot(LABELS, VOCABULARY).float())
    found = []
    for keys, teacher in (({"hard": 1.0}, None), ({"forward_kl": 1.0}, right)):
        student = logits(1).requires_grad_()
        terms = objective(weights=keys, temperature=temperature, kernel=kernel)(
            rows_of(student), teacher, LABELS
        )
        terms.loss.backward()
        found.append((terms.loss.detach(), student.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_no_rows_are_a_loss_of_zero_that_can_be_differentiated() -> None:
    student = logits(1, rows=0).requires_grad_()
    terms = objective(weights={"forward_kl": 1.0})(rows_of(student), rows_of(logits(2, rows=0)), LABELS[:0])
    terms.loss.backward()
    assert float(terms.loss) == 0
    assert int(terms.num_rows) == 0


# ------------------------------------------------------------------------------------------------ whole models


def model(task: str) -> Any:
    architecture, positions = (
        ("bert", "max_position_embeddings") if task == "mlm" else ("gpt2", "n_positions")
    )
    keys = {**SIZES[architecture], positions: LENGTH}
    return build_model(
        task, architecture, keys, vocab_size=VOCABULARY, sequence_length=LENGTH, special_ids={}, seed=1
    )


def question(task: str, tokens: np.ndarray) -> tuple[Inputs, Tensor, Tensor]:
    """(inputs, rows that count, their labels) of token ids [B, L], sample i being number i."""
    ids = np.arange(len(tokens))
    shown, labels = tokens, next_tokens(tokens, TOKENIZER, False)
    if task == "mlm":
        shown, labels = mask_tokens(tokens, 0 * ids, ids, DataConfig(), TOKENIZER, 0)
    mask, positions = attention(tokens, TOKENIZER, task == "clm", False)
    flat = torch.from_numpy(labels).flatten()
    rows = (flat != IGNORE).nonzero().squeeze(1)
    return Inputs(torch.from_numpy(shown), mask, positions), rows, flat[rows]


def loss_and_gradient(net: Any, task: str, tokens: np.ndarray) -> tuple[Tensor, Tensor, int]:
    inputs, rows, labels = question(task, tokens)
    net.zero_grad()
    terms = objective(weights={"hard": 1.0})(counted_rows(net, inputs, rows), None, labels)
    terms.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    return terms.loss.detach(), gradient, int(terms.num_rows)


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_row_of_padding_changes_neither_loss_nor_gradient(task: str) -> None:
    net = model(task)
    tokens = text(6, 3).astype(np.int64)[:5]
    padded = np.concatenate([tokens, np.full((2, LENGTH), TOKENIZER.pad_id)])
    expected, found = loss_and_gradient(net, task, tokens), loss_and_gradient(net, task, padded)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-5)  # other sums inside attention
    assert found[2] == expected[2]


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_only_counted_positions_reach_the_loss(task: str) -> None:
    """Whatever the trunk says elsewhere, loss and gradient stay the same to the bit."""
    net = model(task)
    tokens = text(6, 3).astype(np.int64)
    _, rows, labels = question(task, tokens)
    assert len(rows) < tokens.size
    if task == "mlm":
        assert 0 < len(rows) < 0.3 * tokens.size
    expected = loss_and_gradient(net, task, tokens)

    def disturb(module: Any, arguments: Any, output: Any) -> Any:
        noise = torch.randn(output.last_hidden_state.shape).flatten(0, 1)
        noise[rows] = 0
        output.last_hidden_state = output.last_hidden_state + noise.view_as(output.last_hidden_state)
        return output

    handle = net.base_model.register_forward_hook(disturb)
    found = loss_and_gradient(net, task, tokens)
    handle.remove()
    assert float(found[0]) == float(expected[0])
    assert (found[1] == expected[1]).all()


def test_labels_of_masked_language_modelling_are_the_tokens_before_masking() -> None:
    tokens = text(6, 3).astype(np.int64)
    inputs, rows, labels = question("mlm", tokens)
    assert (torch.from_numpy(tokens).flatten()[rows] == labels).all()
    assert (inputs.input_ids_BL.flatten()[rows] != labels).float().mean() > 0.6
