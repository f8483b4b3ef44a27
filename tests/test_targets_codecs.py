"""What is kept of a teacher, through its bytes and back, against float64; how many bytes that is; draws without bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT
from torch import Tensor

from distill.head import Head
from distill.kernels import SparseTargets, sparse_divergence
from distill.targets.bits import pack_rising, unpack_rising
from distill.targets.codecs import Codec, bytes_a_row, check_codec, make_codec
from distill.targets.decode import from_bytes, hidden_from_bytes, padded
from distill.targets.encode import STEPS_A_NAT, keep, split, to_bytes, uniforms

HALF_STEP = 0.5 / STEPS_A_NAT  # nats: what rounding may move a stored log-probability by


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(rows: int, vocab: int) -> Tensor:
    return torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(9))


def stored(codec: Codec, logits_NV: Tensor, counts: list[int] | None = None) -> tuple[SparseTargets, int]:
    """(what comes back of samples of `counts` rows, bytes before compression)."""
    rows, vocab = logits_NV.shape
    counts = counts or [rows]
    uniform = [uniforms(1, 0, i, count, codec.draws) for i, count in enumerate(counts)]
    hidden, head, labels = torch.eye(rows), Head(logits_NV.T), labels_of(rows, vocab)
    kept = keep(codec, hidden, head, labels, vocab, np.concatenate(uniform) if codec.draws else None)
    payloads = [to_bytes(part, vocab) for part in split(kept, counts)]
    return padded([from_bytes(codec, p, vocab) for p in payloads]), sum(map(len, payloads))


def dense(targets: SparseTargets, vocab: int) -> Tensor:
    return torch.zeros(len(targets.ids_NK), vocab, dtype=torch.float64).scatter_add(
        1, targets.ids_NK, targets.probs_NK.double()
    )


# ------------------------------------------------------------------------------------------------ bits


@given(st.lists(st.integers(0, 2**34), max_size=60), st.integers(1, 2**35))
def test_rising_numbers_come_back_and_leave_what_follows(values: list[int], universe: int) -> None:
    rising = np.sort(np.array(values, np.int64) % universe)
    if universe > 2**20 and len(rising) < 3:  # a bit for each step of the high part
        universe = 2**20
        rising %= universe
        rising.sort()
    found, rest = unpack_rising(memoryview(pack_rising(rising, universe) + b"rest"), len(rising), universe)
    assert found.tolist() == rising.tolist()
    assert bytes(rest) == b"rest"


@pytest.mark.parametrize(("count", "universe"), [(12 * 512, 50257 * 512), (64 * 512, 128256 * 512), (5, 5)])
def test_rising_numbers_take_two_bits_and_their_density(count: int, universe: int) -> None:
    values = np.sort(np.random.default_rng(0).choice(universe, count, replace=False))
    assert 8 * len(pack_rising(values, universe)) <= count * (2 + np.log2(universe / count)) + 24


# ------------------------------------------------------------------------------------------------ cut


@pytest.mark.parametrize(
    ("name", "settings"), [("top_k", {"k": 8}), ("top_p", {"p": 0.8, "k": 30}), ("top_p", {"p": 1.0, "k": 5})]
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kept_classes_tail_and_gold_are_the_teachers_to_the_stated_rounding(
    name: str, settings: dict[str, Any], temperature: float
) -> None:
    logits = random_logits(40, 300)
    targets, _ = stored(make_codec(name, temperature, **settings), logits, [7, 0, 13, 20])
    truth = torch.softmax(logits.double() / temperature, 1)
    is_entry = targets.probs_NK > 0
    for row in range(40):
        ids = targets.ids_NK[row][is_entry[row]]
        best = truth[row].topk(settings["k"]).indices
        mass = truth[row][best].cumsum(0)
        number = (
            settings["k"] if name == "top_k" else min(int((mass < settings["p"]).sum()) + 1, settings["k"])
        )
        assert set(ids.tolist()) == set(best[:number].tolist())
        found = targets.probs_NK[row][is_entry[row]].double()
        # Twice: the sum that all are divided by was rounded too.
        assert float((found.log() - truth[row][ids].log()).abs().max()) < 2 * HALF_STEP + 1e-6
        tail = 1 - truth[row][ids].sum()
        assert targets.tail_N is not None and targets.gold_N is not None
        assert float(targets.tail_N[row].log() - tail.log()) == pytest.approx(0, abs=2 * HALF_STEP + 1e-6)
        gold = truth[row][labels_of(40, 300)[row]]
        assert float(targets.gold_N[row].log() - gold.log()) == pytest.approx(0, abs=2 * HALF_STEP + 1e-6)
    torch.testing.assert_close(targets.probs_NK.sum(1) + targets.tail_N, torch.ones(40), rtol=0, atol=1e-6)


def test_loss_of_stored_top_k_is_the_divergence_of_the_buckets_in_float64() -> None:
    teacher, student, labels = random_logits(30, 200), random_logits(30, 200, 1), labels_of(30, 200)
    targets, _ = stored(make_codec("top_k", 1.0, k=10), teacher)
    found = sparse_divergence(student.double(), targets, labels, impl="reference")
    q, log_p = torch.softmax(teacher.double(), 1), torch.log_softmax(student.double(), 1)
    expected, slack = 0.0, 0.0
    for row in range(30):
        named = {*q[row].topk(10).indices.tolist(), int(labels[row])}
        kept = torch.tensor(sorted(named))
        rest = torch.ones(200, dtype=torch.bool).index_fill(0, kept, False)
        buckets = torch.cat([q[row][kept], q[row][rest].sum()[None]])
        logs = torch.cat([log_p[row][kept], log_p[row][rest].logsumexp(0)[None]])
        expected += float((buckets * (buckets.log() - logs)).sum())
        slack += float((buckets * (buckets.log() - logs + 1).abs()).sum()) * 2.1 * HALF_STEP
    assert abs(float(found.soft) - expected) < slack


def test_all_classes_kept_leave_no_tail() -> None:
    targets, _ = stored(make_codec("top_k", 1.0, k=20), random_logits(6, 20))
    assert targets.tail_N is not None and targets.tail_N.tolist() == [0.0] * 6
    assert torch.isfinite(sparse_divergence(random_logits(6, 20, 1), targets, labels_of(6, 20)).loss)


def test_classes_too_unlikely_to_be_told_from_nothing_are_padding_and_the_loss_stays_finite() -> None:
    sure = torch.zeros(4, 50)
    sure[:, 3] = 200.0
    targets, _ = stored(make_codec("top_k", 1.0, k=5), sure)
    assert dense(targets, 50)[:, 3].tolist() == [1.0] * 4
    assert torch.isfinite(sparse_divergence(random_logits(4, 50, 1), targets, labels_of(4, 50)).loss)


@pytest.mark.parametrize("name", ["top_k", "top_p", "sampled"])
def test_padded_vocabulary_is_never_kept(name: str) -> None:
    logits = random_logits(5, 40)
    wide = torch.cat([logits, torch.full((5, 24), 50.0)], 1)
    codec = make_codec(name, 1.0, k=None if name == "sampled" else 10)
    uniform = uniforms(1, 0, 0, 5, 50) if codec.draws else None
    parts = [
        keep(codec, x, Head(torch.eye(x.shape[1])), labels_of(5, 40), 40, uniform) for x in (logits, wide)
    ]
    assert to_bytes(parts[0], 40) == to_bytes(parts[1], 40)


# ------------------------------------------------------------------------------------------------ drawn


def test_draws_have_the_teachers_frequencies_and_the_gradient_of_the_full_divergence_on_average() -> None:
    """Over 4000 rows of 50 draws each; every class within 5 standard errors sqrt(q (1 - q) / 200000)."""
    rows, vocab = 4000, 60
    teacher, student = random_logits(1, vocab, scale=2.0), random_logits(1, vocab, 1).double()
    targets, _ = stored(make_codec("sampled", 1.0), teacher.expand(rows, vocab))
    q = torch.softmax(teacher.double(), 1)[0]
    sigma = (q * (1 - q) / (50 * rows)).sqrt()
    leaf = student.clone().requires_grad_()
    sparse_divergence(leaf.expand(rows, vocab), targets, impl="reference").loss.backward()
    assert leaf.grad is not None
    full = torch.softmax(student, 1)[0] - q
    assert float(((leaf.grad[0] / rows - full) / sigma).abs().max()) < 5
    # And it is no smaller either: the frequencies of a row vary as those of 50 independent draws.
    spread = dense(targets, vocab).var(0) / (q * (1 - q) / 50)
    assert 0.8 < float(spread[q > 0.01].min()) and float(spread[q > 0.01].max()) < 1.2


def test_draws_of_a_row_sum_to_one_and_are_a_function_of_seed_epoch_sample_and_row() -> None:
    logits, codec = random_logits(1, 90).expand(6, 90), make_codec("sampled", 1.0)
    together, _ = stored(codec, logits, [2, 4])
    torch.testing.assert_close(together.probs_NK.sum(1), torch.ones(6))
    assert together.tail_N is None and together.gold_N is None
    one = uniforms(1, 0, 0, 3, 50)
    assert (uniforms(1, 0, 0, 2, 50) == one[:2]).all()
    others = [uniforms(*key, 3, 50) for key in ((2, 0, 0), (1, 1, 0), (1, 0, 1))]
    assert all((other != one).all() for other in others)
    assert (one >= 0).all() and (one < 1).all() and (one[0] != one[1]).all()


def test_classes_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((3, 30), -torch.inf)
    logits[:, [7, 20]] = 0.0
    kept = keep(make_codec("sampled", 1.0), logits.nan_to_num(neginf=-1e9), Head(torch.eye(30)), labels_of(3, 30), 30,
                np.array([[0.0] * 25 + [1 - 2.0**-53] * 25] * 3))  # fmt: skip
    targets = padded([from_bytes(make_codec("sampled", 1.0), to_bytes(kept, 30), 30)])
    assert dense(targets, 30)[:, [7, 20]].tolist() == [[0.5, 0.5]] * 3


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_hidden_states_come_back_to_the_bit(dtype: torch.dtype, name: str) -> None:
    hidden = random_logits(9, 24).to(dtype)
    kept = keep(make_codec("hidden", 2.0), hidden, Head(torch.eye(24).to(dtype)), labels_of(9, 24), 24)
    back = [hidden_from_bytes(to_bytes(part, 24), name) for part in split(kept, [4, 0, 5])]
    assert [len(part) for part in back] == [4, 0, 5]
    assert torch.equal(torch.cat(back), hidden)


# ------------------------------------------------------------------------------------------------ bytes


def language(rows: int, vocab: int, exponent: float = 1.6) -> Tensor:
    """Logits of a power law over classes in random order: at 1.6, 50 draws are about 15 different classes."""
    rng = np.random.default_rng(0)
    logits = -exponent * np.log(1 + np.arange(vocab))
    return torch.from_numpy(np.stack([rng.permutation(logits) for _ in range(rows)])).float()


@pytest.mark.parametrize("vocab", [1000, 50257, 128256])
def test_fifty_draws_of_less_than_18_different_classes_take_48_bytes_at_most(vocab: int) -> None:
    targets, size = stored(make_codec("sampled", 1.0), language(64, vocab))
    assert 12 < float((targets.probs_NK > 0).sum(1).float().mean()) < 18
    assert size / 64 <= 48


@pytest.mark.parametrize(("vocab", "expected"), [(50257, 81), (128256, 89)])
def test_fifty_draws_of_a_flat_teacher_take_the_bytes_that_the_readme_says(vocab: int, expected: int) -> None:
    targets, size = stored(make_codec("sampled", 1.0), torch.zeros(64, vocab))
    assert float((targets.probs_NK > 0).sum(1).float().mean()) > 49
    assert size / 64 == pytest.approx(expected, abs=0.5)
    assert f"{expected} " in (ROOT / "distill" / "targets" / "README.md").read_text().split("exponent 1.6")[1]


@pytest.mark.parametrize("vocab", [1000, 50257, 262144])
@pytest.mark.parametrize("exponent", [1.6, 0.0])
def test_top_64_takes_260_bytes_at_most_whatever_the_teacher(vocab: int, exponent: float) -> None:
    _, size = stored(
        make_codec("top_k", 1.0), language(16, vocab, exponent) + random_logits(16, vocab, scale=0.1)
    )
    assert size / 16 <= 260
    assert bytes_a_row(make_codec("top_k", 1.0), vocab) == pytest.approx(size / 16, rel=0.05)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "top_k", "k": 129}, r"--k must be in 1..128 \(the tokens of the vocabulary\), got 129"),
        ({"name": "top_k", "k": 0}, "got 0"),
        ({"name": "top_p", "p": 0.0, "k": 5}, "--p must be above 0 and at most 1, got 0.0"),
        ({"name": "top_p", "p": float("nan"), "k": 5}, "got nan"),
        ({"name": "sampled", "draws": 0}, "--draws must be at least 1, got 0"),
        ({"name": "sampled", "temperature": 0.0}, "temperature=0.0 makes the teacher its arg-max"),
    ],
)
def test_codec_that_keeps_nothing_or_too_much_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_codec(make_codec(**{"temperature": 1.0, **settings}), 128)


def test_setting_that_the_codec_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="--draws is read by codec sampled only, got --codec top_k"):
        make_codec("top_k", 1.0, draws=5)


@pytest.mark.parametrize("name", ["top_k", "sampled", "hidden"])
def test_teacher_that_says_nan_is_refused(name: str) -> None:
    hidden = random_logits(4, 128)
    hidden[2, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        keep(make_codec(name, 1.0), hidden, Head(torch.eye(128)), labels_of(4, 128), 128, np.zeros((4, 50)))
