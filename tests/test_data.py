"""Samples: each once an epoch, in an order and with masks that only (seed, epoch, index) decide."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import LENGTH, TOKENIZER, VOCABULARY, config, ragged_text, text

from data_prep.shards import CorruptShard, TokenizerInfo, write_shards
from distill.config import DataConfig
from distill.data import (
    IGNORE,
    Batch,
    Samples,
    attention,
    mask_tokens,
    micro_batch_positions,
    next_tokens,
    train_batches,
    validation_batches,
)
from distill.sample_order import BLOCK, key_of, permute, sample_ids

GOLDEN_ORDER = [78, 452, 402, 365, 887, 560, 679, 122]
GOLDEN_ACROSS_EPOCHS = [947, 930, 988, 927, 175, 85, 203, 225]
GOLDEN_KEY = 7702586659592502839

# ------------------------------------------------------------------------------------------------ order


def epoch_of(size: int, window: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    epochs, ids = sample_ids(np.arange(epoch * size, (epoch + 1) * size), size, window, seed)
    assert (epochs == epoch).all()
    return ids


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025])
def test_permutation_takes_every_value_once(size: int) -> None:
    assert sorted(permute(np.arange(size), size, key_of(3, size))) == list(range(size))


@pytest.mark.parametrize(
    "size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 77]
)
@pytest.mark.parametrize("window", [1, 2, 100, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 77, 65536])
def test_every_epoch_visits_every_sample_once(size: int, window: int) -> None:
    for epoch in (0, 1, 5):
        assert sorted(epoch_of(size, window, epoch=epoch)) == list(range(size))


@hypothesis.settings(max_examples=25)
@given(st.integers(1, 3000), st.integers(1, 4000), st.integers(0, 2**63 - 1), st.integers(0, 9))
def test_every_epoch_visits_every_sample_once_at_any_size(
    size: int, window: int, seed: int, epoch: int
) -> None:
    assert len(np.unique(epoch_of(size, window, seed, epoch))) == size


@given(st.integers(1, 2000), st.integers(1, 500), st.lists(st.integers(0, 20_000), min_size=1, max_size=40))
def test_order_of_a_position_does_not_depend_on_what_is_asked_with_it(
    size: int, window: int, positions: list[int]
) -> None:
    together = sample_ids(np.array(positions), size, window, 1)
    alone = [sample_ids(np.array([p]), size, window, 1) for p in positions]
    assert together[0].tolist() == [int(e[0]) for e, _ in alone]
    assert together[1].tolist() == [int(i[0]) for _, i in alone]


def test_epochs_and_seeds_differ_and_window_1_keeps_the_order_of_the_shards() -> None:
    orders = [tuple(epoch_of(600, 65536, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert epoch_of(600, 1, seed=5, epoch=3).tolist() == list(range(600))


def test_shuffled_samples_land_anywhere_in_their_window() -> None:
    """No position keeps its neighbourhood: rank correlation of order and position is that of chance."""
    order = epoch_of(40 * BLOCK, 65536)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4 / np.sqrt(len(order))


def test_order_is_the_pinned_one() -> None:
    """Who changes the order makes all earlier runs incomparable: it must be meant."""
    assert sample_ids(np.arange(8), 1000, 65536, 0)[1].tolist() == GOLDEN_ORDER
    assert sample_ids(np.arange(996, 1004), 1000, 300, 42)[1].tolist() == GOLDEN_ACROSS_EPOCHS
    assert int(key_of(1, 2, 3)) == GOLDEN_KEY


def test_key_depends_on_the_order_of_its_parts() -> None:
    assert (
        len({int(key_of(*parts)) for parts in [(0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (-1,), (-1, 0)]}) == 7
    )


# ------------------------------------------------------------------------------------------------ layout


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_every_layout_takes_the_same_samples_in_every_step(world_size: int, micro: int) -> None:
    for step in (0, 3):
        accumulated = 8 // world_size // micro
        taken: list[int] = []
        for rank in range(world_size):
            positions = micro_batch_positions(8 * step, 8, micro, rank, world_size)
            for chunk in islice(positions, accumulated):
                assert len(chunk) == micro
                taken += chunk.tolist()
        assert taken == list(range(8 * step, 8 * step + 8))


def samples(shards: Path, tmp_path: Path, **changes: object) -> Samples:
    changed = config(shards, tmp_path / "unused", **{f"data__{k}": v for k, v in changes.items()})
    return Samples(changed.data, "train", seed=3, shuffle=True)


def same(one: Batch, other: Batch) -> bool:
    pairs = [
        (one.rows_N, other.rows_N),
        (one.labels_N, other.labels_N),
        *zip(one.inputs, other.inputs, strict=True),
    ]
    return all((a is None and b is None) or bool((a == b).all()) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_resume_are_those_of_the_undisturbed_run(
    shards: Path, tmp_path: Path, workers: int
) -> None:
    """600 samples: the run passes into its second epoch, where samples return with other masks."""
    calm = list(islice(train_batches(samples(shards, tmp_path), 560, 8, 4, 0, 1), 20))
    resumed = train_batches(samples(shards, tmp_path, num_workers=workers), 560 + 5 * 8, 8, 4, 0, 1)
    assert all(same(a, b) for a, b in zip(calm[10:], islice(resumed, 10), strict=True))


def test_resume_reads_none_of_the_samples_before(shards: Path, tmp_path: Path) -> None:
    data = samples(shards, tmp_path)
    read: list[int] = []
    reader = data.reader

    class Watched:
        index, split = reader.index, reader.split

        def __len__(self) -> int:
            return len(reader)

        def __getitem__(self, sample: int) -> np.ndarray:
            read.append(sample)
            return reader[sample]

    data.reader = Watched()  # type: ignore[assignment]
    next(train_batches(data, 400, 8, 8, 0, 1))
    assert read == sample_ids(np.arange(400, 408), 600, 65536, 3)[1].tolist()


def test_validation_takes_the_same_samples_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    data = Samples(config(shards, tmp_path).data, "validation", seed=0, shuffle=False)
    for limit, number in ((16, 16), (40, 40), (1000, 40), (1, 1)):
        alone = np.concatenate([b.sample_ids for b in validation_batches(data, limit, 8, 0, 1)])
        assert len(np.unique(alone)) == len(alone) == number
        parts = [b.sample_ids for rank in range(3) for b in validation_batches(data, limit, 3, rank, 3)]
        assert np.concatenate(parts).tolist() == alone.tolist()


@pytest.mark.parametrize("limit", [1, 7, 10, 40])
def test_every_rank_validates_on_as_many_batches_though_some_count_for_nothing(
    limit: int, shards: Path, tmp_path: Path
) -> None:
    data = Samples(config(shards, tmp_path).data, "validation", seed=0, shuffle=False)
    ranks = [list(validation_batches(data, limit, 3, rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    for batch in (b for batches in ranks for b in batches):
        assert len(batch.inputs.input_ids_BL) > 0
        assert len(batch.rows_N) == len(batch.labels_N)
        assert (len(batch.rows_N) > 0) == (len(batch.sample_ids) > 0)


# ------------------------------------------------------------------------------------------------ masks


def masked(number: int = 400, seed: int = 0, epoch: int = 0, **rates: float) -> tuple[np.ndarray, ...]:
    tokens = text(number, 5).astype(np.int64)
    ids = np.arange(number)
    out, labels = mask_tokens(tokens, np.full(number, epoch), ids, DataConfig(**rates), TOKENIZER, seed)
    return tokens, out, labels


def test_masking_rates_are_right_within_four_sigma() -> None:
    tokens, out, labels = masked()
    words = tokens > TOKENIZER.mask_id
    chosen = labels != IGNORE
    assert (labels[chosen] == tokens[chosen]).all()
    assert not chosen[~words].any()
    assert (out[~chosen] == tokens[~chosen]).all()
    number = chosen.sum()
    shares = {
        chosen[words].mean(): (0.15, words.sum()),
        (out[chosen] == TOKENIZER.mask_id).mean(): (0.8, number),
        (out[chosen] == tokens[chosen]).mean(): (0.1 + 0.1 / (VOCABULARY - 5), number),
    }
    for found, (expected, trials) in shares.items():
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / trials)


@pytest.mark.parametrize(
    ("rates", "changed"),
    [
        ({"mask_rate": 1.0, "mask_token_share": 1.0, "random_token_share": 0.0}, "all masked"),
        ({"mask_rate": 1.0, "mask_token_share": 0.0, "random_token_share": 0.0}, "none changed"),
        ({"mask_rate": 0.0}, "none predicted"),
    ],
)
def test_masking_at_the_ends_of_its_rates(rates: dict[str, float], changed: str) -> None:
    tokens, out, labels = masked(20, **rates)
    words = tokens > TOKENIZER.mask_id
    expected = np.where(words, TOKENIZER.mask_id, tokens) if changed == "all masked" else tokens
    assert (out == expected).all()
    assert ((labels != IGNORE) == (words if changed != "none predicted" else False)).all()


def test_masks_are_keyed_by_seed_epoch_and_sample() -> None:
    _, out, _ = masked()
    assert (masked()[1] == out).all()
    for other in (masked(seed=1)[1], masked(epoch=1)[1]):
        assert (other != out).mean() > 0.1
    tokens = text(9, 5).astype(np.int64)
    ids, epochs = np.array([7, 3, 7]), np.array([0, 0, 1])
    one, _ = mask_tokens(tokens[[7, 3, 7]], epochs, ids, DataConfig(), TOKENIZER, 0)
    two, _ = mask_tokens(tokens[[3, 7]], np.array([0, 0]), np.array([3, 7]), DataConfig(), TOKENIZER, 0)
    assert (one[:2] == two[::-1]).all()  # whatever stands beside it in the batch
    assert (one[0] != one[2]).any()


def test_random_tokens_cover_all_but_the_special_ones() -> None:
    tokens, out, labels = masked(3000, mask_rate=1.0, mask_token_share=0.0, random_token_share=1.0)
    counts = Counter(out[labels != IGNORE].tolist())
    assert set(counts) == set(range(TOKENIZER.mask_id + 1, VOCABULARY))


def test_task_mlm_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    bare = TokenizerInfo("6" * 64, VOCABULARY, 0, 1, 2, 3, None)
    write_shards(tmp_path / "s", {"train": text(4, 1)}, bare, sequence_length=LENGTH)
    with pytest.raises(ValueError, match="no mask token"):
        samples(tmp_path / "s", tmp_path)


# ------------------------------------------------------------------------------------------------ labels


S, E, P = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
PACKED = np.array([[S, 10, 11, E, S, 12, E, P], [13, 14, E, S, 15, 16, 17, 18]])


def test_next_token_labels_end_at_padding_and_at_the_end() -> None:
    labels = next_tokens(PACKED, TOKENIZER, isolate_documents=False)
    i = IGNORE
    assert labels.tolist() == [[10, 11, E, S, 12, E, i, i], [14, E, S, 15, 16, 17, 18, i]]


def test_next_token_labels_of_isolated_documents_do_not_cross() -> None:
    labels = next_tokens(PACKED, TOKENIZER, isolate_documents=True)
    i = IGNORE
    assert labels.tolist() == [[10, 11, E, i, 12, E, i, i], [14, E, i, 15, 16, 17, 18, i]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
def test_attention_sees_what_it_should(causal: bool, isolated: bool) -> None:
    mask, positions = attention(PACKED, TOKENIZER, causal, isolated)
    assert mask is not None
    documents = np.array([[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 1, 1, 1, 1]])
    for b in range(2):
        for query in range(8):
            for key in range(8):
                pads = (PACKED[b, query] == P, PACKED[b, key] == P)
                sees = pads[0] == pads[1]
                sees &= not isolated or documents[b, query] == documents[b, key]
                sees &= not causal or key <= query
                assert mask[b, 0, query, key] == sees
    if isolated:
        assert positions is not None
        assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 3, 4]]
    else:
        assert positions is None


def test_full_sequences_leave_attention_to_the_model() -> None:
    assert attention(PACKED[1:], TOKENIZER, True, False) == (None, None)


def test_every_query_sees_something() -> None:
    mask, _ = attention(ragged_text(50, 3), TOKENIZER, True, True)
    assert mask is not None
    assert mask.any(-1).all()


# ------------------------------------------------------------------------------------------------ bad shards


def test_flipped_byte_is_found_by_the_first_read_of_its_shard(tmp_path: Path) -> None:
    write_shards(
        tmp_path / "s", {"train": text(20, 1)}, TOKENIZER, sequence_length=LENGTH, samples_per_shard=10
    )
    path = tmp_path / "s" / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    data = samples(tmp_path / "s", tmp_path, shuffle_window=1)
    data[np.arange(10)]
    with pytest.raises(CorruptShard, match=r"train-00001.tar has sha256 .* expected"):
        data[np.arange(10, 12)]


def test_two_folders_with_the_same_samples_have_one_fingerprint(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shards(tmp_path / name, {"train": text(20, seed)}, TOKENIZER, sequence_length=LENGTH)
        prints.append(samples(tmp_path / name, tmp_path).fingerprint)
    assert prints[0] == prints[1] != prints[2]
