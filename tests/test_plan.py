"""What `distill plan` says of a run is what the run then needs; where it can't know, it says what to give."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LENGTH, SIZES, VOCABULARY, config
from transformers import AutoModelForMaskedLM, BertConfig

from distill.__main__ import main
from distill.build import build_run
from distill.distributed import start
from distill.models import num_parameters, work_of
from distill.plan import Plan, Site, make_plan
from distill.plan_text import plan_text
from distill.trajectory.manifest import load_manifest

CONFIGS = Path(__file__).parent.parent / "distill" / "configs"
ONE = Site(ranks=1, ranks_per_node=1)
STUDENT: dict[str, Any] = {"schedule__kind": "explicit", "schedule__stages": [[0, 2], [5, 24]]}


@pytest.fixture
def plan(shards: Path, teacher_run: Path, tmp_path: Path) -> Plan:
    taught = {**STUDENT, "teacher__trajectory": str(teacher_run / "trajectory")}
    return make_plan(config(shards, tmp_path / "run", **taught), ONE)


@pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
def test_parameters_and_schedule_are_those_of_the_run(
    plan: Plan, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    run = build_run(plan.config, start(), tmp_path)
    assert plan.student_parameters == num_parameters(run.engine.model)
    assert plan.schedule == run.schedule
    assert plan.micro_batch_size == run.micro


def test_stored_targets_are_estimated_by_the_rows_that_count(plan: Plan) -> None:
    rows = 12 * 8 * LENGTH * 0.15
    assert plan.target_bytes["hidden"] == pytest.approx(rows * 32 * 4, rel=0.02)  # of width 32 in fp32
    assert 0 < plan.target_bytes["sampled draws=50"] < plan.target_bytes["top_k k=64"]
    assert "GB sampled draws=50" in plan_text(plan)
    assert "of 50 draws 12 taken to be of different tokens" in plan_text(plan)


def test_storage_is_each_byte_of_the_checkpoints_that_teach_once(plan: Plan, teacher_run: Path) -> None:
    known = load_manifest(teacher_run / "trajectory").checkpoints
    expected = sum(size for step in (2, 24) for size, _ in known[step].files.values())
    assert set(plan.checkpoint_bytes) == {2, 24}
    assert plan.storage_bytes == expected


def test_folder_without_a_cache_is_read_by_every_node_and_with_one_by_all_together(plan: Plan) -> None:
    four = Site(ranks=4, ranks_per_node=1)
    spread = dataclasses.replace(plan, site=four)
    assert spread.storage_bytes == 4 * plan.storage_bytes
    assert "every node reads all where it lies; teacher.cache=FOLDER" in plan_text(spread)
    taught = dataclasses.replace(plan.config.teacher, cache="/scratch")
    cached = dataclasses.replace(spread, config=dataclasses.replace(plan.config, teacher=taught))
    assert cached.storage_bytes == plan.storage_bytes
    assert "each byte once, then from node to node" in plan_text(cached)


def test_every_teacher_that_a_following_schedule_may_name_is_counted(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    follows = {"schedule__kind": "saturation", "schedule__checkpoints": [2, 8, 24]}
    taught = {**follows, "teacher__trajectory": str(teacher_run / "trajectory")}
    assert set(make_plan(config(shards, tmp_path / "run", **taught), ONE).checkpoint_bytes) == {2, 8, 24}


def test_shards_that_are_there_are_counted_and_tell_vocabulary_and_length(plan: Plan, shards: Path) -> None:
    assert plan.shard_bytes == sum(p.stat().st_size for p in shards.glob("*.tar"))
    assert plan.sequence_length == LENGTH
    assert plan.tokens == 12 * 8 * LENGTH


def test_options_that_save_memory_are_planned_for(shards: Path, teacher_run: Path, tmp_path: Path) -> None:
    taught = {**STUDENT, "teacher__trajectory": str(teacher_run / "trajectory")}
    saving = {"engine__offload_optimizer": True, "engine__activation_checkpointing": True}
    saving |= {"teacher__zero_stage": 3, "teacher__offload": True}
    plain, less = (
        make_plan(config(shards, tmp_path / "run", **taught, **more), ONE) for more in ({}, saving)
    )
    assert less.memory[1].optimizer == 0 < plain.memory[1].optimizer
    assert less.host_optimizer_bytes == 16 * less.student_parameters
    assert less.memory[1].activations < plain.memory[1].activations
    said = plan_text(less)
    assert "host memory of a rank" in said and "dealt over the ranks, in host memory" in said
    assert plain.host_teacher_bytes == 4 * plain.teacher_parameters  # the next one waits, whole
    assert "of optimizer" not in plan_text(plain)


def with_terms(shards: Path, teacher_run: Path, folder: Path, **weights: float) -> Plan:
    taught = {**STUDENT, "teacher__trajectory": str(teacher_run / "trajectory")}
    objective = {"objective__weights": {"forward_kl": 1.0, **weights}}
    return make_plan(config(shards, folder / "run", **taught, **objective), ONE)


def test_term_on_logits_costs_further_products_of_the_last_layers(
    plan: Plan, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    """Beside 3 of the student's and 1 of the teacher's, by the 15 % of rows that count."""
    found = with_terms(shards, teacher_run, tmp_path, atkd=1.0)
    with torch.device("meta"):
        own = work_of(AutoModelForMaskedLM.from_config(_tiny_config()))
    assert found.student_flops - plan.student_flops == pytest.approx(4 * 2 * own.head * 0.15, rel=0.02)
    assert found.teacher_flops - plan.teacher_flops == pytest.approx(2 * 2 * own.head * 0.15, rel=0.02)
    said = plan_text(found)
    assert "terms     atkd: products of the last layers" in said and "terms " not in plan_text(plan)


def test_second_run_of_the_trunks_plain_attention_and_learned_weights_are_planned_for(
    plan: Plan, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    mixed = with_terms(shards, teacher_run, tmp_path, mixkd=1.0)
    assert 1.5 < mixed.student_flops / plan.student_flops < 3
    assert 1.5 < mixed.teacher_flops / plan.teacher_flops < 3
    seen = with_terms(shards, teacher_run, tmp_path, attention_kl=1.0)
    shape = _tiny_config()
    kept = (
        2 * shape.num_hidden_layers * shape.num_attention_heads * 8 * LENGTH**2 * 4
    )  # of both models, in fp32
    assert seen.memory[1].activations - plan.memory[1].activations == kept
    learned = with_terms(shards, teacher_run, tmp_path, hidden_square=1.0)
    assert learned.learned_parameters == shape.hidden_size**2
    assert learned.memory[1].optimizer - plan.memory[1].optimizer == 12 * shape.hidden_size**2
    assert "learned   0.0 M parameters of the objective" in plan_text(learned)
    assert learned.trajectory_bytes == plan.trajectory_bytes and learned.saved_bytes > plan.saved_bytes


def _tiny_config() -> BertConfig:
    return BertConfig(vocab_size=VOCABULARY, **SIZES["bert"])


def test_memory_decides_what_fits(plan: Plan) -> None:
    total = plan.memory[1].total
    tight = dataclasses.replace(plan, site=Site(memory_gib=total / 2**30))
    assert tight.fits(1)
    assert not dataclasses.replace(plan, site=Site(memory_gib=(total - 1) / 2**30)).fits(1)


def test_time_comes_from_the_speed_given_else_measured_else_the_operations_sustained(
    shards: Path, tmp_path: Path
) -> None:
    own = config(shards, tmp_path / "run")
    assert make_plan(own, ONE).seconds == 0
    by_operations = make_plan(own, dataclasses.replace(ONE, tflops=1e-6))
    assert by_operations.tokens_per_second == pytest.approx(1e6 / by_operations.student_flops)
    (tmp_path / "run").mkdir()
    rows = [{"kind": "train", "step": i, "tokens_per_second": float(i)} for i in (1, 2, 9)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_plan(own, ONE).seconds == 12 * 8 * LENGTH / 2
    assert "measured on the ranks that it had" in plan_text(make_plan(own, ONE))
    assert make_plan(own, dataclasses.replace(ONE, tflops=1e-6)) == by_operations
    given = make_plan(own, dataclasses.replace(ONE, tokens_per_second=96.0))
    assert given.seconds == 32
    assert "saving    0.0 GB every 13 s" in plan_text(given)  # 5 steps of 8/3 s


def test_stall_is_the_part_of_a_fetch_that_the_teacher_before_does_not_cover(plan: Plan) -> None:
    """Teacher 24 follows after 5 of 12 steps of a run of 32 seconds."""
    size = plan.checkpoint_bytes[24]
    assert plan.fetches == [(size, 0.0)] and plan.stall_seconds == 0
    timed = dataclasses.replace(plan, tokens_per_second=96.0)
    (_, seconds) = timed.fetches[0]
    assert seconds == pytest.approx(32 * 5 / 12)
    assert timed.enough_mb_per_second == pytest.approx(size / 1e6 / seconds)
    assert "stall     give --storage-mb-per-second; none where storage gives" in plan_text(timed)

    def on(speed: float) -> Plan:
        return dataclasses.replace(timed, site=dataclasses.replace(ONE, storage_mb_per_second=speed))

    assert on(1.01 * timed.enough_mb_per_second).stall_seconds == 0
    assert on(timed.enough_mb_per_second / 3).stall_seconds == pytest.approx(2 * seconds)
    assert f"stall     {2 * seconds:.0f} s of waiting" in plan_text(on(timed.enough_mb_per_second / 3))


def test_teacher_run_says_what_trajectory_it_leaves(shards: Path, tmp_path: Path) -> None:
    own = make_plan(config(shards, tmp_path, save__trajectory_every=4, save__trajectory_first=1), ONE)
    assert own.trajectory_bytes == 5 * own.student_parameters * 4  # after steps 1, 2, 4, 8, 12


@pytest.mark.parametrize(
    ("changes", "site", "sentence"),
    [
        ({"batch_size": 9}, Site(ranks=2), r"batch_size 9 must be 2 rank\(s\) x micro_batch_size 4 x"),
        ({"batch_size": 4}, Site(ranks=8), r"batch_size 4 must be 8 rank\(s\) x micro_batch_size 0 x"),
        ({"data__shards": "/no"}, ONE, "/no holds no shards yet: give --vocab-size and --sequence-length"),
        ({"teacher__trajectory": "/no"}, ONE, "give the teacher's config.json as --teacher-config"),
    ],
)
def test_what_can_not_be_known_is_asked_for(
    changes: dict[str, Any], site: Site, sentence: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_plan(config(shards, tmp_path, **changes), site)


def test_teacher_still_to_be_fetched_needs_its_steps_named(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": VOCABULARY}))
    site = dataclasses.replace(ONE, teacher_config=tmp_path / "config.json")
    with pytest.raises(ValueError, match="name the teacher's steps in schedule.checkpoints"):
        make_plan(config(shards, tmp_path / "run", teacher__trajectory="/no"), site)


def test_command_plans_a_published_pair_from_its_configs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers of parameters are those of the model cards of Pythia 160M and 1.4B."""
    pair = [str(CONFIGS / "gpt_neox_student.yaml"), f"run_dir={tmp_path}/run", "data.shards=/no"]
    taught = ["teacher.trajectory=/no", "schedule.kind=equal", "schedule.checkpoints=[1000,143000]"]
    site = ["--ranks=64", "--vocab-size=50304", "--sequence-length=2048", "--tokens-per-second=1e6"]
    site += ["teacher.cache=/scratch"]  # a setting behind an option
    teacher = ["--teacher-config", str(CONFIGS.parent.parent / "slurm" / "pythia_1.4b.json")]
    monkeypatch.setattr("sys.argv", ["distill", "plan", *pair, *taught, *site, *teacher])
    assert main() == 0
    said = capsys.readouterr().out
    for line in (
        "student   162.3 M parameters, bf16",
        "teacher   1,414.6 M parameters, bf16, whole on every rank",
        "layout    64 rank(s) on 8 node(s), 1 micro-batch(es) of 16 sequences a rank and step",
        "storage   2 checkpoint(s) of 2.83 GB: 5.7 GB read in all, 0.7 GB by each node",
        "ends on the final teacher: yes",
        "time      11.7 h at 1,000,000 tokens/s",
    ):
        assert line in said


README = CONFIGS.parent.parent / "slurm" / "README.md"
PLANS = re.findall(r"```bash\n(distill plan .*?)\n```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("ranks", [8, 64, 512])
@pytest.mark.parametrize("command", PLANS, ids=["pythia", "bert"])
def test_figures_of_the_cluster_readme_are_the_planners(
    command: str, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(README.parent.parent)
    smaller = {512: ["micro_batch_size=2" if "pythia" in command else "micro_batch_size=8"]}.get(ranks, [])
    monkeypatch.setattr(
        "sys.argv", [*shlex.split(command.replace("\\\n", "")), "--ranks", str(ranks), *smaller]
    )
    assert main() == 0
    said = capsys.readouterr().out
    table = README.read_text().split(command)[1].split("On disk")[0]
    column = [8, 64, 512].index(ranks) + 1
    rows = {
        line.split("|")[1].strip(): line.split("|")[1 + column].strip()
        for line in table.splitlines()
        if "|" in line
    }
    (hours,) = (value for name, value in rows.items() if name.endswith("steps take"))
    (storage,) = (value for name, value in rows.items() if name.startswith("read from storage"))
    assert f"time      {hours} at" in said
    assert f"{storage} by each node (each byte once" in said
    (memory,) = (value for name, value in rows.items() if name.startswith("memory of a rank"))
    totals = re.search(r"total +([\d. ]+)", said)
    assert totals and float(totals[1].split()[1]) == pytest.approx(float(memory), abs=0.051)


def test_text_says_what_does_not_fit(plan: Plan) -> None:
    assert "too much" not in plan_text(plan)
    assert "too much" in plan_text(dataclasses.replace(plan, site=Site(memory_gib=0.0)))
