"""Terms in real runs: rows of metrics, layouts, kills, split weights; what is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from term_case import IN_ANY_RUN, ROW_WISE
from test_equivalence import assert_close_rows, parameters
from tiny import (
    Kill,
    assert_same_run,
    config,
    distill,
    distill_on_ranks,
    rows,
    settings,
)

from distill.config import TERMS as NAMES
from distill.config import ObjectiveConfig
from distill.objectives.soft_labels import refuse_unserved
from distill.objectives.terms import TERMS, check_terms, help_text, learned_modules, needs_of, settings_of
from distill.targets.codecs import make_codec
from distill.train import train

WEIGHTS = {"forward_kl": 0.5, "hard": 0.1}


def student(teacher_run: Path, names: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    return {
        "teacher__trajectory": str(teacher_run / "trajectory"),
        "objective__weights": {**WEIGHTS, **{name: 0.2 for name in names}},
        "steps": 6,
        "log__every": 1,
        "log__eval_every": 3,
        **changes,
    }


def test_every_term_trains_and_is_logged_apart(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    changes = student(teacher_run, tuple(IN_ANY_RUN), steps=8)
    distill(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path).ok()
    for row in rows(tmp_path / "run", "train"):
        parts = {name: row["soft"] if name == "forward_kl" else row["hard"] for name in WEIGHTS}
        parts |= {name: row[f"term_{name}"] for name in IN_ANY_RUN}
        weights = changes["objective__weights"]
        assert row["loss"] == pytest.approx(
            sum(weights[name] * value for name, value in parts.items()), rel=1e-4
        )
    names = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not [name for name in names if "learned" in name]


def test_run_killed_between_its_rows_goes_on_to_the_same_bits(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    """Pairs, draws and gates are drawn anew the same way, learned modules and their optimizer go on, rows are whole."""
    changes = student(
        teacher_run, tuple(IN_ANY_RUN), save__every=2, log__every=5, steps=7, micro_batch_size=4
    )
    changes["objective__weights"]["atkd"] = [[0, 0.0], [1, 0.5]]
    distill(["train", *settings(shards, tmp_path / "calm", **changes)], tmp_path).ok()
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 5)).code == -9
    distill(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path).ok()
    distill(arguments, tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")


@pytest.mark.parametrize(
    ("ranks", "micro", "stage"), [(1, 2, 1), pytest.param(2, 2, 2, marks=pytest.mark.slow), (2, 4, 3)]
)
def test_row_wise_terms_do_not_depend_on_the_layout(
    ranks: int, micro: int, stage: int, ragged: Path, teacher_run: Path, tmp_path: Path
) -> None:
    steady = {"optim__eps": 1e-3, "optim__clip": 0.05}
    changes = student(teacher_run, ROW_WISE, **steady)
    distill(["train", *settings(ragged, tmp_path / "whole", **changes)], tmp_path).ok()
    changes |= {"micro_batch_size": micro, "engine__zero_stage": stage}
    arguments = ["train", *settings(ragged, tmp_path / "run", **changes)]
    for ended in (
        [distill(arguments, tmp_path)] if ranks == 1 else distill_on_ranks(arguments, tmp_path, ranks)
    ):
        ended.ok()
    assert_close_rows(tmp_path / "run", tmp_path / "whole")
    torch.testing.assert_close(
        parameters(tmp_path / "run"), parameters(tmp_path / "whole"), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_attentions_and_layers_come_of_padded_causal_and_isolated_inputs(
    task: str, ragged: Path, tmp_path: Path
) -> None:
    teacher = settings(
        ragged, tmp_path / "t", data__task=task, steps=2, save__trajectory_every=2, log__eval_every=2
    )
    distill(["train", *teacher], tmp_path).ok()
    names = ("attention_kl", "hidden_cosine")
    changes = student(tmp_path / "t", names, data__task=task, steps=2, data__isolate_documents=task == "clm")
    distill(["train", *settings(ragged, tmp_path / "run", **changes)], tmp_path).ok()
    assert all(row["term_attention_kl"] >= 0 for row in rows(tmp_path / "run", "train"))


@pytest.mark.slow
def test_bf16_learned_modules_and_all_terms_of_split_weights(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    names = tuple(name for name in IN_ANY_RUN if name != "kdiga")  # which takes whole weights
    changes = student(teacher_run, names, engine__dtype="bf16", engine__zero_stage=3, steps=3)
    for ended in distill_on_ranks(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path, 2):
        ended.ok()
    assert len(rows(tmp_path / "run", "train")) == 3


# ------------------------------------------------------------------------------------------------ names and settings


def test_names_of_the_config_are_those_of_the_terms() -> None:
    assert tuple(TERMS) == NAMES


def test_help_lists_every_term_with_its_settings() -> None:
    lines = {line.split()[0]: line for line in help_text().splitlines() if line.strip()}
    for name, term in TERMS.items():
        assert term.help in lines[name]
        assert all(f"{key}={value}" in lines[name] for key, value in settings_of(term.function).items())
        assert ("stored" in lines[name].split("[live")[1]) == term.stored


def test_every_source_is_in_the_docstring() -> None:
    assert [name for name, term in TERMS.items() if "ource" not in (term.function.__doc__ or "")] == []


@pytest.mark.parametrize(
    ("weights", "given", "said"),
    [
        (
            {"rld": 1.0},
            {"rld": {"other": 1}},
            "objective.settings.rld.other is unknown; did you mean others?",
        ),
        ({"relations": 1.0}, {"relations": {"x": 1}}, "valid: temperature"),
        ({"atkd": 1.0}, {"rld": {"others": 1}}, "objective.settings.rld is for no term of objective.weights"),
        ({"hard": 1.0}, {"hard": {"k": 1}}, "which names none"),
        (
            {"pearson": 1.0},
            {"pearson": {"classes": 129}},
            "is 129, but the vocabulary has 128: set it to less",
        ),
        ({"pearson": 1.0}, {"pearson": {"classes": 2.5}}, "must be a whole number, got 2.5"),
        ({"pearson": 1.0}, {"pearson": {"classes": 0}}, "must be at least 1, got 0"),
        ({"ckd": 1.0}, {"ckd": {"group": 1}}, "must be at least 2, got 1"),
        ({"ckd": 1.0}, {"ckd": {"temperature": "warm"}}, "must be like its default 4.0, got 'warm'"),
        ({"gate": 1.0}, {"gate": {"slope": -1}}, "must be at least 0, got -1"),
        ({"gate": 1.0}, {"gate": {"slope": float("nan")}}, "slope must be finite, got nan"),
        ({"ckd": 1.0}, {"ckd": {"temperature": float("inf")}}, "temperature must be finite, got inf"),
        ({"atkd": 1.0}, {"atkd": {"easy_share": 1.5}}, "easy_share must be at most 1, got 1.5"),
        ({"curriculum": 1.0}, {"curriculum": {"until": 2.0}}, "until must be at most 1, got 2.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(weights: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + said.replace("?", r"\?")):
        check_terms(ObjectiveConfig(weights=weights, settings=given), 128)


def test_term_that_stored_targets_can_not_serve_is_refused_with_those_they_can() -> None:
    with pytest.raises(
        ValueError, match=r"weights.dpk needs more of the teacher than there is, as targets.*atkd, rld"
    ):
        check_terms(ObjectiveConfig(weights={"dpk": 1.0}), 128, "buckets", "targets are stored")
    check_terms(
        ObjectiveConfig(weights={"atkd": 1.0, "forward_kl": 1.0}), 128, "buckets", "targets are stored"
    )
    check_terms(ObjectiveConfig(weights={"cross_head": 1.0, "ada_alpha": 1.0}), 128, "hidden", "stored")
    with pytest.raises(ValueError, match="weights.attention_kl needs more"):
        check_terms(ObjectiveConfig(weights={"attention_kl": 1.0}), 128, "hidden", "stored")
    with pytest.raises(ValueError, match="weights.atkd needs more"):
        check_terms(ObjectiveConfig(weights={"atkd": 1.0}), 128, "draws", "drawn")


@pytest.mark.parametrize(
    ("made_at", "name", "settings", "said"),
    [
        (
            2.0,
            "atkd",
            {},
            "names atkd, for which the teacher speaks at temperature 1.* made at 2.0: score at 1",
        ),
        (1.0, "rld", {"temperature": 4.0}, "settings.rld.temperature is 4.0, but .* are cut"),
        (
            1.0,
            "rld",
            {"confidence_temperature": 2},
            "settings.rld.confidence_temperature is 2, but .* are cut",
        ),
    ],
)
def test_terms_on_cut_targets_are_refused_at_temperatures_other_than_1(
    made_at: float, name: str, settings: dict[str, float], said: str
) -> None:
    weights = {"forward_kl": 1.0, name: 1.0}
    objective = ObjectiveConfig(weights=weights, settings={name: settings}, temperature=made_at)
    with pytest.raises(ValueError, match=said):
        refuse_unserved(objective, make_codec("top_k", made_at), "here")
    refuse_unserved(objective, make_codec("hidden", made_at), "here")
    plain = ObjectiveConfig(weights={"forward_kl": 1.0}, temperature=made_at)
    refuse_unserved(plain, make_codec("top_k", made_at), "here")


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
def test_bad_settings_are_refused_before_a_model_is_made(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    changes = student(teacher_run, ("pearson",), objective__settings={"pearson": {"classes": 1000}})
    with pytest.raises(ValueError, match="the vocabulary has 128"):
        train(config(shards, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_needs_are_those_of_all_terms_and_learned_modules_those_of_the_seed() -> None:
    assert needs_of({"hard": 1, "dpk": 1, "attention_kl": 1, "ada_alpha": 1}) == {
        "layers", "width", "attentions", "words"
    }  # fmt: skip
    assert needs_of({"hard": 1, "atkd": 1}) == set()
    one, same, other = (
        learned_modules(["cross_head"], 4, 5, seed)["cross_head"].weight for seed in (1, 1, 2)
    )  # type: ignore
    assert torch.equal(one, same)  # type: ignore[arg-type]
    assert not torch.equal(one, other)  # type: ignore[arg-type]
