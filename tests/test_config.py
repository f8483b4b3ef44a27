"""Configs: the order of merging, every problem at once with the nearest name, the pinned list of keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import ROOT

from distill.config import FUSED, Config, fields_of, help_text, to_yaml
from distill.config_reader import ConfigError, coerce, load_config
from distill.config_rules import COLDEST_SOFT, check
from distill.experiments.wiki_books import arms
from distill.kernels.terms import ARGMAX_BELOW, KINDS

CONFIGS = ROOT / "distill" / "configs"
NEEDED = ["run_dir=runs/x", "data.shards=shards"]
WITH_TEACHER = [*NEEDED, "teacher.trajectory=runs/t/trajectory"]

# Adding a key is a decision: add it here, and keep the list short.
KEYS = """
run_dir seed steps batch_size micro_batch_size
data.shards data.task data.mask_rate data.mask_token_share data.random_token_share
data.isolate_documents data.span_depth data.shuffle_window data.num_workers
model.architecture model.overrides model.init_from model.init_layers model.prune_to model.prune_until
teacher.trajectory teacher.targets teacher.tokenizer teacher.dtype teacher.zero_stage teacher.ensemble teacher.pool
teacher.offload teacher.unfinished teacher.cache teacher.cache_gb
schedule.kind schedule.checkpoints schedule.num_stages schedule.stage_steps schedule.early_share
schedule.stages schedule.speed schedule.patience schedule.min_gain
objective.weights objective.settings
objective.speculate_from objective.speculate_top_k objective.beta objective.temperature
objective.temperature_on objective.temperature_squared
objective.chunk_rows objective.kernel
optim.lr optim.beta1 optim.beta2 optim.eps optim.weight_decay optim.clip optim.warmup_share optim.decay
optim.decay_share optim.final_lr_share
engine.zero_stage engine.dtype engine.offload_optimizer engine.activation_checkpointing engine.compile
save.every save.keep save.trajectory_every save.trajectory_first
save.trajectory_drop_every save.trajectory_to
log.every log.eval_every log.eval_samples
""".split()


def test_list_of_keys_is_the_pinned_one() -> None:
    assert [key for key, _, _ in fields_of(Config())] == KEYS
    assert len(KEYS) <= 74


def test_every_key_is_explained_in_the_help_with_its_default() -> None:
    lines = {line.split()[0]: line for line in help_text().splitlines()}
    for key, field, value in fields_of(Config()):
        assert repr(value) in lines[key]
        assert field.metadata["help"] in lines[key]


def test_later_layers_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 5\nseed: 1\nbatch_size: 2\noptim: {lr: 0.1, beta1: 0.8}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\nbatch_size: 4\noptim: {lr: 0.2}\n")
    config = load_config(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], [*NEEDED, "batch_size=8", "batch_size=16"]
    )
    assert (config.steps, config.seed, config.batch_size) == (5, 2, 16)
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (0.2, 0.8, 0.95)


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config([tmp_path / "empty.yaml"], NEEDED) == load_config([], NEEDED)


def test_key_inside_a_dictionary_leaves_its_neighbours_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {overrides: {hidden_size: 256, num_hidden_layers: 2}}\n")
    config = load_config(
        [tmp_path / "a.yaml"],
        [*NEEDED, "model.overrides.num_hidden_layers=4", "model.overrides.rope.theta=9"],
    )
    assert config.model.overrides == {"hidden_size": 256, "num_hidden_layers": 4, "rope": {"theta": 9}}
    assert yaml.safe_load(to_yaml(config))["model"]["overrides"] == config.model.overrides


def test_whole_dictionary_replaces_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("objective: {weights: {forward_kl: 1}}\n")
    config = load_config([tmp_path / "a.yaml"], [*NEEDED, "objective.weights={hard: 1}"])
    assert config.objective.weights == {"hard": 1.0}


def test_weights_default_to_the_teacher_if_there_is_one_else_to_the_labels() -> None:
    assert load_config([], NEEDED).objective.weights == {"hard": 1.0}
    assert load_config([], WITH_TEACHER).objective.weights == {"forward_kl": 1.0}


def test_stored_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(
        [], [*WITH_TEACHER, "objective.temperature=[[0, 2], [1, 0.5]]", "schedule.kind=equal"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "config.yaml"], []) == config


def problems(*assignments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([], list(assignments))
    return caught.value.problems


def test_all_problems_are_told_at_once() -> None:
    found = problems("stepz=3", "optim.lr=high", "batch_size=1.5", "data=3", "nonsense")
    assert len(found) == 5
    text = str(ConfigError(found))
    assert "5 problem(s)" in text
    assert all(problem in text for problem in found)


def test_all_contradictions_are_told_at_once() -> None:
    found = problems("steps=0", "optim.warmup_share=2", "engine.zero_stage=4", "schedule.kind=n_t")
    assert len(found) == 6  # and neither run_dir nor data.shards is set


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("optim.learning_rte=1", "unknown key optim.learning_rte"),
        ("optim.warmup_shares=1", "did you mean optim.warmup_share?"),
        ("warmup_share=1", "did you mean optim.warmup_share?"),
        ("data.temperature=1", "did you mean objective.temperature?"),
        ("dta.task=mlm", "did you mean data?"),
        ("xyzzy=1", "valid here: run_dir, seed"),
        ("steps=true", "steps: expected int, got True"),
        ("steps=1e3", "steps: expected int, got '1e3'"),
        ("data.isolate_documents=1", "data.isolate_documents: expected bool, got 1"),
        ("optim.lr=[1]", "optim.lr: expected float, got [1]"),
        ("objective.temperature=warm", "expected a number or a list of [share, value], got 'warm'"),
        ("schedule.checkpoints=[1, two]", "schedule.checkpoints: expected int, got 'two'"),
        ("optim=adam", "optim is a group of settings, got 'adam'; set e.g. optim.KEY=..."),
        ("steps.a=3", "steps: expected int, got {'a': 3}"),
        ("steps", "'steps' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
        ("steps=[1", "the value is not YAML"),
    ],
)
def test_key_or_value_that_is_not_understood_is_named(assignment: str, said: str) -> None:
    assert said in "\n".join(problems(*NEEDED, assignment))


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["data.task=mlmm"], "data.task must be one of mlm, clm, got 'mlmm'"),
        (["data.mask_rate=1.5"], "data.mask_rate must lie in 0 to 1, got 1.5"),
        (["data.mask_rate=.nan"], "data.mask_rate: expected float, got nan"),
        (["data.mask_token_share=0.9", "data.random_token_share=0.2"], "must not pass 1, got 0.9 + 0.2"),
        (["data.num_workers=-1"], "data.num_workers must not be negative, got -1"),
        (["seed=9223372036854775808"], "seed must fit 64 bits, got 9223372036854775808"),
        (["optim.lr=0"], "optim.lr must be above 0, got 0.0"),
        (["optim.lr=.inf"], "optim.lr: expected float, got inf"),
        (["optim.clip=-1"], "optim.clip must not be negative, got -1.0"),
        (["optim.weight_decay=-1"], "optim.weight_decay must not be negative, got -1.0"),
        (["optim.beta2=1"], "optim.beta2 must be at least 0 and below 1, got 1.0"),
        (["micro_batch_size=-2"], "micro_batch_size must not be negative, got -2"),
        (["engine.zero_stage=0"], "takes a wrong first Adam step"),
        (
            ["engine.zero_stage=0", "engine.dtype=fp32", "engine.offload_optimizer=true"],
            "for engine.zero_stage 1 to 3, got 0",
        ),
        (["engine.zero_stage=3", "engine.compile=true"], "for engine.zero_stage 0 to 2, got 3"),
        (["teacher.offload=true"], "set teacher.zero_stage=3 (on one rank too), got 0"),
        (["engine.zero_stage=4"], "engine.zero_stage must be 0, 1, 2 or 3, got 4"),
        (["objective.beta=1.5"], "objective.beta must lie in 0 to 1, got 1.5"),
        (["objective.beta=0.1"], "objective.beta=0.1 is read by jsd only"),
        (["objective.chunk_rows=-1"], "objective.chunk_rows must not be negative, got -1"),
        (
            ["teacher.trajectory=t", "objective.weights={forward_kl: 1, tvd: 1}"],
            "objective.weights names forward_kl and tvd: one divergence from the teacher at a time, keep one",
        ),
        (
            [
                "teacher.trajectory=t",
                "objective.weights={reverse_kl: 1}",
                "objective.temperature=[[0, 1], [1, 0]]",
            ],
            "objective.temperature falls to 0.0, where the teacher is its arg-max",
        ),
        (
            [
                "teacher.trajectory=t",
                "objective.weights={jsd: 1}",
                "objective.beta=1",
                "objective.temperature=0",
            ],
            "the reverse KL infinite: keep it at 0.0001 or above",
        ),
        (["objective.weights={hrd: 1}"], "objective.weights.hrd is unknown; did you mean hard?"),
        (["objective.weights={atdk: 1}"], "objective.weights.atdk is unknown; did you mean atkd?"),
        (["objective.weights={rld: 1}"], "teacher.trajectory is not set"),
        (["objective.weights={hard: 0}"], "objective.weights are all 0 from 0 to 1 of the budget"),
        (
            [
                "teacher.trajectory=t",
                "objective.weights={rld: [[0.2, 1], [0.5, 0]], hard: [[0.7, 0], [1, 1]]}",
            ],
            "objective.weights are all 0 from 0.5 to 0.7 of the budget",
        ),
        (["objective.speculate_from=0.5"], "it needs data.task=clm"),
        (["objective.speculate_from=0.5", "data.task=clm"], "needs one live teacher"),
        (
            ["objective.speculate_from=0.5", "data.isolate_documents=true"],
            "goes on across the ends of documents",
        ),
        (["objective.speculate_from=0.5", "engine.zero_stage=3"], "whose weights must be whole"),
        (
            [
                "objective.speculate_from=0.5",
                "objective.weights={forward_kl: 1, hard: [[0, 0], [0.6, 0], [1, 1]]}",
            ],
            "the labels are the student's own words",
        ),
        (["objective.speculate_from=1.5"], "objective.speculate_from must lie in 0 to 1, got 1.5"),
        (["objective.speculate_top_k=0"], "objective.speculate_top_k must be above 0, got 0"),
        (["model.init_layers=[0, 2]"], "are layers of model.init_from, which is not set"),
        (["model.prune_to={ffn: 0}"], "model.prune_to.ffn must be above 0 and at most 1, got 0.0"),
        (["model.prune_to.ffn=1.5"], "model.prune_to.ffn must be above 0 and at most 1, got 1.5"),
        (["model.prune_to={fnn: 0.5}"], "model.prune_to.fnn is unknown; did you mean ffn?"),
        (["model.prune_until=0.5"], "model.prune_until=0.5 is read with model.prune_to only"),
        (
            ["model.prune_to={ffn: 0.5}", "model.prune_until=2"],
            "model.prune_until must lie in 0 to 1, got 2.0",
        ),
        (
            ["model.prune_to={ffn: 0.5}", "model.prune_until=0.3", "optim.warmup_share=0.3"],
            "model.prune_until=0.3 must be above optim.warmup_share=0.3, where pruning begins",
        ),
        (["model.prune_to={ffn: 0.5}", "save.trajectory_every=5"], "set save.trajectory_every=0"),
        (["model.prune_to={ffn: 0.5}", "engine.compile=true"], "was not tried with engine.compile=true"),
        (["teacher.trajectory=t", "objective.weights={ckd: 1}"], "gives weight to ckd alone"),
        (
            ["teacher.trajectory=t", "objective.weights={dpk: 1, forward_kl: [[0, 0], [1, 0]]}"],
            "gives weight to dpk alone, which leaves the student's probabilities open: add an anchor",
        ),
        (["objective.settings={atkd: 3}"], "objective.settings.atkd must be {key: value}, got 3"),
        (["objective.weights={forward_kl: 1}"], "teacher.trajectory is not set"),
        (["teacher.trajectory=t", "objective.weights={hard: 1}"], "the teacher would run for nothing"),
        (["objective.weights={hard: -1}"], "objective hard: must not be negative, got -1.0"),
        (["objective.weights={hard: .nan}"], "objective.weights: expected"),
        (["objective.temperature=[]"], "a ramp is a list of [share, value], got []"),
        (["objective.temperature=[[0, 1], [2, 1]]"], "must rise within 0 to 1, got [0.0, 2.0]"),
        (["objective.temperature=[[0.5, 1], [0.2, 1]]"], "must rise within 0 to 1, got [0.5, 0.2]"),
        (["objective.temperature=[[0.5]]"], "a ramp is a list of [share, value]"),
        (["schedule.kind=explicit"], "needs schedule.stages"),
        (["schedule.kind=explicit", "schedule.stages=[[0, 5], [3]]"], "schedule.stages must be pairs"),
        (["schedule.kind=n_t"], "needs schedule.stage_steps above 0"),
        (["schedule.kind=equal", "schedule.checkpoints=[5]"], "has one entry: use kind=one_shot"),
        (
            ["schedule.kind=equal", "schedule.stages=[[0, 5]]"],
            "read by kind explicit only, got schedule.kind=equal",
        ),
        (
            ["schedule.stage_steps=5"],
            "schedule.stage_steps=5 is read by kind n_t and saturation only, got schedule.kind=one_shot",
        ),
        (
            ["schedule.num_stages=3"],
            "schedule.num_stages=3 is read by kind equal and n_t and saturation only",
        ),
        (["schedule.kind=equal", "schedule.speed=2"], "schedule.speed=2.0 is read by kind speed only"),
        (
            ["schedule.kind=explicit", "schedule.stages=[[0, 5]]", "schedule.checkpoints=[5, 6]"],
            "schedule.checkpoints=[5, 6] is read by kind one_shot and equal and",
        ),
        (["model.init_from=m", "model.overrides={hidden_size: 8}"], "model.init_from brings its own config"),
        (
            ["optim.decay=wsd", "optim.warmup_share=0.5", "optim.decay_share=0.6"],
            "must not pass 1 with decay=wsd, got 0.5 + 0.6",
        ),
        (["schedule.patience=3"], "schedule.patience=3 is read by kind saturation only"),
        (["schedule.kind=saturation", "schedule.patience=0"], "schedule.patience must be above 0, got 0"),
        (
            ["schedule.kind=saturation", "schedule.min_gain=2"],
            "schedule.min_gain must lie in 0 to 1, got 2.0",
        ),
        (
            ["schedule.kind=saturation", "schedule.stage_steps=-1"],
            "schedule.stage_steps must not be negative",
        ),
        (["schedule.num_stages=-1"], "schedule.num_stages must not be negative, got -1"),
        (["save.trajectory_every=-1"], "save.trajectory_every must not be negative, got -1"),
        (["save.trajectory_first=5"], "save.trajectory_first needs save.trajectory_every"),
    ],
)
def test_contradiction_is_refused_with_the_value(assignments: list[str], said: str) -> None:
    assert said in "\n".join(problems(*NEEDED, *assignments))


def test_objectives_are_those_of_the_kernels_and_hard_labels() -> None:
    assert FUSED == (*KINDS, "hard")
    assert COLDEST_SOFT == ARGMAX_BELOW


@pytest.mark.parametrize("name", [name for name in FUSED if name != "hard"])
def test_every_divergence_can_be_mixed_with_hard_labels(name: str) -> None:
    config = load_config([], [*WITH_TEACHER, f"objective.weights={{{name}: 0.5, hard: 0.5}}"])
    assert config.objective.weights == {name: 0.5, "hard": 0.5}


@pytest.mark.parametrize("content", ["- a\n- b\n", "steps: [1\n", "\xff\xfe".encode("latin-1"), None])
def test_file_that_is_no_yaml_mapping_is_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config([path], NEEDED)


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (1, float, 1.0),
        ("1e-3", float, 0.001),
        ([1, 2.5], list[float], [1.0, 2.5]),
        ({"a": 1}, dict[str, Any], {"a": 1}),
    ],
)
def test_coercion_accepts_what_yaml_makes_of_numbers(value: Any, hint: Any, result: Any) -> None:
    assert coerce(value, hint) == result


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_that_comes_along_holds(file: Path) -> None:
    assert load_config([file], NEEDED).steps > 0


def test_arms_of_the_study_hold() -> None:
    for arm in arms(Path("trajectory")):
        load_config([CONFIGS / "demo_student.yaml"], [*NEEDED, *arm.settings])


def test_default_config_lacks_its_two_folders_only() -> None:
    config = Config()
    config.objective.weights = {"hard": 1.0}
    assert [problem.split()[0] for problem in check(config)] == ["run_dir", "data.shards"]


def test_total_samples_are_steps_times_batch() -> None:
    assert load_config([], [*NEEDED, "steps=7", "batch_size=3"]).total_samples == 21


def test_reading_a_config_imports_no_torch() -> None:
    script = "import sys, distill.config_reader, distill.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_yaml_of_a_config_is_plain() -> None:
    assert yaml.safe_load(to_yaml(Config()))["optim"]["lr"] == 1e-3
