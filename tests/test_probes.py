"""Probes of a teacher: exact answers on models whose habits are known, calibration, the phase transition."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LENGTH, SIZES, TOKENIZER, VOCABULARY
from torch import nn

from data_prep.shards import write_shards
from distill.config import DataConfig
from distill.config_reader import load_config
from distill.data import Samples
from distill.models import Inputs, build_model, counted_rows
from distill.probes.ngrams import choose_places, ngram_dependence
from distill.probes.quality import BINS, bucket_names, chance, frequency_ranks, measure
from distill.probes.transition import NoTransition, suggest_schedule

SIZES_OF_NGRAMS = (2, 3, 5)


class Habit(nn.Module):
    """A masked model that repeats, with certainty, the word `offset` places further on; None: always word 9."""

    def __init__(self, offset: int | None) -> None:
        super().__init__()
        self.config, self.offset = SimpleNamespace(model_type="habit"), offset
        self.device = torch.device("cpu")
        self.base_model = self._trunk

    def _trunk(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        seen = torch.full_like(input_ids, 9) if self.offset is None else input_ids.roll(-self.offset, 1)
        return SimpleNamespace(last_hidden_state=50.0 * nn.functional.one_hot(seen, VOCABULARY).float())

    def get_output_embeddings(self) -> nn.Module:
        layer = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        nn.init.eye_(layer.weight)  # what the trunk says is the logits
        return layer


def samples_of(shards: Path, task: str = "mlm", **more: Any) -> Samples:
    return Samples(DataConfig(shards=str(shards), task=task, **more), "validation", 0, shuffle=False)


def medians(
    model: Any, samples: Samples, sizes: tuple[int, ...] = SIZES_OF_NGRAMS, micro: int = 7
) -> dict[str, float]:
    places = choose_places(samples, 12, 3, sizes)
    return {name: found[1] for name, found in ngram_dependence(model, samples, places, sizes, micro).items()}


def test_a_model_that_repeats_its_left_neighbour_leans_on_every_ngram_and_needs_no_more(shards: Path) -> None:
    found = medians(Habit(-1), samples_of(shards))
    assert [found[f"robust_{n}"] for n in SIZES_OF_NGRAMS] == [1, 1, 1]
    assert [found[f"close_{n}"] for n in SIZES_OF_NGRAMS] == [0, 0, 0]


def test_a_model_that_repeats_its_right_neighbour_does_not_lean_on_the_bigram(shards: Path) -> None:
    found = medians(Habit(1), samples_of(shards))
    assert [found[f"robust_{n}"] for n in SIZES_OF_NGRAMS] == [0, 1, 1]
    assert [found[f"close_{n}"] for n in SIZES_OF_NGRAMS] == [1, 0, 0]


def test_a_model_that_looks_three_places_on_leans_on_no_5_gram(shards: Path) -> None:
    found = medians(Habit(3), samples_of(shards))
    assert found["robust_5"] == 0 and found["close_5"] == 1


def test_a_model_that_looks_nowhere_depends_on_nothing(shards: Path) -> None:
    assert set(medians(Habit(None), samples_of(shards)).values()) == {0}


def test_total_variation_is_half_the_l1_norm(shards: Path) -> None:
    """A model that gives word 9 probability 3/4 unless the left neighbour is hidden, then 1/4: distance 1/2."""
    model = Habit(-1)

    def trunk(input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        hidden = input_ids.roll(1, 1) == TOKENIZER.mask_id
        logits = torch.full((*input_ids.shape, VOCABULARY), -50.0)
        logits[..., 8] = torch.where(hidden, math.log(3.0), 0.0)
        logits[..., 9] = torch.where(hidden, 0.0, math.log(3.0))
        return SimpleNamespace(last_hidden_state=logits)

    model.base_model = trunk
    assert medians(model, samples_of(shards), (2,))["robust_2"] == pytest.approx(0.5)


def real_model(task: str, architecture: str) -> Any:
    overrides = {
        **SIZES[architecture],
        "n_positions" if architecture == "gpt2" else "max_position_embeddings": LENGTH,
    }
    return build_model(
        task, architecture, overrides, vocab_size=VOCABULARY, sequence_length=LENGTH, special_ids={}, seed=3
    ).eval()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_a_causal_models_m_close_is_that_of_the_words_alone(architecture: str, shards: Path) -> None:
    model, samples, n = real_model("clm", architecture), samples_of(shards, "clm"), 3
    places = choose_places(samples, 6, 2, (n,))
    expected = []
    for tokens, at in zip(places.tokens_KL, places.at_K, strict=True):
        whole, alone = (
            counted_rows(
                model,
                Inputs(torch.tensor(tokens[None, s:at]), None, torch.arange(s, at)[None]),
                torch.tensor([at - s - 1]),
            )
            for s in (0, at - n + 1)
        )
        p, q = (r.head(r.hidden_ND).softmax(1) for r in (whole, alone))
        expected.append(float((p - q).abs().sum().detach() / 2))
    found = ngram_dependence(model, samples, places, (n,), 4)["close_3"]
    assert found == pytest.approx(np.quantile(expected, [0.25, 0.5, 0.75]).tolist(), rel=1e-3)
    assert min(found) > 0


def test_a_causal_models_ngram_is_replaced_and_nothing_else(shards: Path) -> None:
    """A model that repeats the word before the last depends on trigrams (two words), not on bigrams (one)."""
    found = medians(Habit(-1), samples_of(shards, "clm"), (2, 3))
    assert found["robust_2"] == 0 and found["robust_3"] == 1


@pytest.mark.parametrize(("task", "architecture"), [("mlm", "bert"), ("clm", "gpt2")])
def test_answers_do_not_depend_on_the_micro_batch(task: str, architecture: str, shards: Path) -> None:
    samples, model = samples_of(shards, task), real_model(task, architecture)
    one, other = (medians(model, samples, micro=micro) for micro in (3, 36))
    assert one == pytest.approx(other, abs=1e-7)  # what float32 makes of a sum over the vocabulary


def test_places_stand_among_words_and_apart(shards: Path) -> None:
    places = choose_places(samples_of(shards), 40, 4, (5,))
    for tokens, at in zip(places.tokens_KL, places.at_K, strict=True):
        assert (tokens[at - 2 : at + 3] > TOKENIZER.mask_id).all()
    pairs = [(tokens.tobytes(), int(at)) for tokens, at in zip(places.tokens_KL, places.at_K, strict=True)]
    assert len(set(pairs)) == len(pairs)


def test_ngrams_longer_than_any_run_of_words_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match="no sequence has 61 words in a row"):
        choose_places(samples_of(shards), 4, 1, (61,))


# ------------------------------------------------------------------------------------------------ quality


class Fixed(Habit):
    """The same probabilities for every masked word."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__(None)
        self.base_model = lambda input_ids, **_: SimpleNamespace(
            last_hidden_state=probabilities.log().float().expand(*input_ids.shape, -1)
        )


def words_with(shares: dict[int, float], folder: Path) -> Path:
    """Shards whose words come with these chances."""
    rng = np.random.default_rng(0)
    tokens = rng.choice(list(shares), (400, LENGTH), p=list(shares.values()))
    write_shards(folder, {"train": tokens, "validation": tokens}, TOKENIZER, sequence_length=LENGTH)
    return folder


def test_log_loss_brier_and_calibration_are_their_definitions(tmp_path: Path) -> None:
    shards = words_with({10: 0.7, 11: 0.2, 12: 0.1}, tmp_path / "s")
    samples = samples_of(shards)
    p = torch.full((VOCABULARY,), 1e-6, dtype=torch.float64)
    p[10], p[11], p[12] = 0.9, 0.06, 0.04 - 125e-6
    found = measure(Fixed(p), samples, frequency_ranks(samples.reader), 400, 64)  # type: ignore[arg-type]
    labels = torch.cat([samples[np.arange(k, k + 50)].labels_N for k in range(0, 400, 50)])
    assert found["num_rows"] == len(labels)
    assert found["loss"] == pytest.approx(float(-p[labels].log().mean()), rel=1e-5)
    hits = float((labels == 10).double().mean())
    assert found["accuracy"] == pytest.approx(hits)
    assert found["ece"] == pytest.approx(0.9 - hits, rel=1e-4)  # all confidences lie in one bin
    brier = float(
        (p.expand(len(labels), -1) - nn.functional.one_hot(labels, VOCABULARY)).square().sum(1).mean()
    )
    assert found["brier"] == pytest.approx(brier, rel=1e-5)
    shares = torch.bincount(labels)[10:13] / len(labels)
    frequencies = {"accuracy": hits, "loss": float(-(shares * shares.log()).sum())}
    assert chance(samples, 400, 64) == pytest.approx(frequencies, rel=1e-5)


def test_a_calibrated_model_has_a_small_calibration_error_and_the_least_log_loss(tmp_path: Path) -> None:
    shares = {10: 0.7, 11: 0.2, 12: 0.1}
    samples = samples_of(words_with(shares, tmp_path / "s"))
    ranks = frequency_ranks(samples.reader)
    p = torch.full((VOCABULARY,), 1e-9, dtype=torch.float64)
    for word, share in shares.items():
        p[word] = share
    honest = measure(Fixed(p), samples, ranks, 400, 64)  # type: ignore[arg-type]
    sure = measure(Fixed((p**3) / (p**3).sum()), samples, ranks, 400, 64)  # type: ignore[arg-type]
    assert honest["ece"] < 4 * math.sqrt(0.21 / honest["num_rows"]) < sure["ece"]
    assert honest["loss"] < sure["loss"] and honest["accuracy"] == sure["accuracy"]


def test_buckets_weigh_up_to_the_whole_and_are_ranked_by_training_frequency(shards: Path) -> None:
    samples = samples_of(shards)
    ranks = frequency_ranks(Samples(samples.config, "train", 0, shuffle=False).reader)
    assert sorted(ranks) == list(range(VOCABULARY))
    found = measure(real_model("mlm", "bert"), samples, ranks, 40, 16)
    names = bucket_names(VOCABULARY)
    assert names == ["1-10", "11-100", "101-128"]
    labels = samples[np.arange(40)].labels_N.numpy()
    sizes = [
        ((ranks[labels] >= low) & (ranks[labels] < high)).sum()
        for low, high in ((0, 10), (10, 100), (100, 128))
    ]
    weighed = sum(n * found.get(f"loss_rank_{name}", 0.0) for n, name in zip(sizes, names, strict=True))
    assert weighed / sum(sizes) == pytest.approx(found["loss"], rel=1e-6)


@pytest.mark.parametrize(("size", "names"), [(8, ["1-8"]), (10, ["1-10"]), (11, ["1-10", "11-11"])])
def test_small_vocabularies_have_buckets(size: int, names: list[str]) -> None:
    assert bucket_names(size) == names


def test_confidences_of_one_fall_into_the_last_bin(shards: Path) -> None:
    samples = samples_of(shards)
    found = measure(Habit(None), samples, frequency_ranks(samples.reader), 8, 8)  # type: ignore[arg-type]
    assert BINS == 15 and found["ece"] == pytest.approx(1 - found["accuracy"])


# ------------------------------------------------------------------------------------------------ transition

CHANCE = {"accuracy": 0.05, "loss": 5.55}
STEPS = (25, 50, 100, 200, 400, 600, 800, 1000, 1500, 2000)
LOSSES = (6.0, 5.6, 5.5, 5.5, 5.4, 5.0, 4.3, 3.9, 3.6, 3.5)
TOP1 = (0.05, 0.05, 0.05, 0.05, 0.07, 0.1, 0.17, 0.21, 0.25, 0.27)


def rows_of(
    steps: Any = STEPS, losses: Any = LOSSES, top1: Any = TOP1, robust: Any = None
) -> list[dict[str, Any]]:
    rows = [
        {"step": s, "loss": loss, "accuracy": a, "num_rows": 10_000.0}
        for s, loss, a in zip(steps, losses, top1, strict=True)
    ]
    for row, value in zip(rows, robust or [], strict=False):
        row["robust_3"] = [0.0, value, 1.0]
    return rows


def test_the_transition_is_found_and_the_steep_first_steps_are_passed_over() -> None:
    found = suggest_schedule(rows_of(), CHANCE)
    assert (found.early, found.final) == (800, 2000)
    assert "passed over as such: [25, 50, 100, 200]" in found.reasons[1]


def test_a_guess_better_than_chance_with_a_loss_that_is_not_is_noise() -> None:
    """A real teacher at step 25: it knows where words stand, so that its top-1 is above that of frequencies."""
    losses, top1 = (9.0, 8.0, *LOSSES[2:]), (0.1, 0.1, *TOP1[2:])
    found = suggest_schedule(rows_of(losses=losses, top1=top1), CHANCE)
    assert found.early == 800 and "passed over as such: [25, 50, 100, 200]" in found.reasons[1]


def test_the_fall_to_the_plateau_of_frequencies_is_not_the_transition() -> None:
    """A real causal teacher: step 50 has a loss below frequencies' and a top-1 above, and ends the steepest fall."""
    steps = (25, 50, 100, 200, 250, 500, 1000, 2000, 3000)
    losses = (1.219, 0.866, 0.651, 0.477, 0.444, 0.375, 0.337, 0.303, 0.293)
    top1 = (0.615, 0.608, 0.649, 0.738, 0.754, 0.791, 0.813, 0.839, 0.845)
    found = suggest_schedule(rows_of(steps, losses, top1), {"accuracy": 0.537, "loss": 0.980})
    assert found.early == 100
    assert (
        "from 0.866 at step 50 to 0.477 at step 200; one above that of word frequencies, 0.980"
        in found.reasons[0]
    )


def test_the_final_teacher_is_the_last_of_the_trajectory_not_of_the_steps_asked() -> None:
    found = suggest_schedule(rows_of(STEPS[:8], LOSSES[:8], TOP1[:8]), CHANCE, final=2000)
    assert (found.early, found.final) == (800, 2000)
    assert (
        found.reasons[-1]
        == "then the final teacher, step 2000, for 90% of the budget; the steps asked end at 1000"
    )


@pytest.mark.parametrize(
    ("peak", "verdict"), [(600, "confirms"), (50, "does NOT confirm"), (2000, "neither confirms nor refutes")]
)
def test_the_ngram_probe_has_its_say(peak: int, verdict: str) -> None:
    robust = [0.9 if step == peak else 0.5 if abs(step - peak) <= 200 else 0.1 for step in STEPS]
    assert any(verdict in reason for reason in suggest_schedule(rows_of(robust=robust), CHANCE).reasons)


def test_the_suggestion_is_a_config_with_its_reasons(tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text(suggest_schedule(rows_of(), CHANCE).to_yaml())
    config = load_config([path], ["run_dir=r", "data.shards=s", "teacher.trajectory=t"])
    assert (config.schedule.kind, config.schedule.checkpoints) == ("two_shot", [800, 2000])
    assert path.read_text().startswith("# step 800: the loss falls fastest there")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (rows_of(STEPS[:3], LOSSES[:3], TOP1[:3]), "at least 4 are needed"),
        (rows_of(top1=[0.05] * 10), "this teacher has not learned yet"),
        (rows_of(STEPS[5:], LOSSES[5:], TOP1[5:]), "the transition may lie before it"),
        (rows_of(top1=[0.05] * 9 + [0.27]), "must leave more checkpoints while its loss falls"),
    ],
)
def test_a_trajectory_without_a_usable_transition_is_told_what_to_do(
    rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(NoTransition, match=message):
        suggest_schedule(rows, CHANCE)
