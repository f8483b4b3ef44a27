"""Sparse parity: the task by its definition, networks side by side as if alone, teachers by their schedules, resume."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.config import OptimConfig, ScheduleConfig
from distill.config_reader import ConfigError
from distill.experiments.parity.arms import make_arms, pick_checkpoints
from distill.experiments.parity.checkpoints import Trajectory, describe_net, open_trajectory
from distill.experiments.parity.findings import claims, table
from distill.experiments.parity.models import MODELS, Params, logits_of, stacked
from distill.experiments.parity.population import LABELS_ALONE, BadState, Lesson, Population
from distill.experiments.parity.probe import FourierProbe
from distill.experiments.parity.runs import Arm, Curve, train_students, train_teachers
from distill.experiments.parity.settings import Net, Settings, load_settings
from distill.experiments.parity.task import STUDENT, TEACHER, Task, samples
from distill.experiments.parity.teachers import Teachers
from distill.experiments.sparse_parity import main
from distill.trajectory.manifest import BadTrajectory

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# R1's shape at a size of seconds; the teachers go through their transition between steps 800 and 1200.
SHORT = Settings(
    d=20, k=4, seeds=[2, 3], every=100, early_steps=500, early_distance=200, temperatures=[0.0],
    probe_samples=4000, teacher=Net(200, 2000), student=Net(12, 2400),
)  # fmt: skip
TINY = Settings(
    d=6, k=2, seeds=[0, 3], every=5, batch_size=8, validation_samples=64, teacher=Net(16, 20), student=Net(8, 20)
)  # fmt: skip
TINY_ARGUMENTS = [
    *("d=6", "k=2", "seeds=[0, 3]", "every=5", "early_steps=10", "early_distance=5", "temperatures=[0]"),
    *("teacher.width=64", "teacher.steps=300", "student.width=8", "student.steps=80"),
    *("validation_samples=256", "probe_samples=500"),
]


def signs(d: int) -> torch.Tensor:
    """All of {-1, 1}^d."""
    return torch.tensor(list(itertools.product((1.0, -1.0), repeat=d)))


# ------------------------------------------------------------------------------------------------ task


def test_label_of_plain_parity_is_whether_the_product_over_the_support_is_negative() -> None:
    x = signs(6)
    assert torch.equal(Task(6, 4).labels(x), (x[:, :4].prod(1) < 0).long())


@pytest.mark.parametrize("depth", [2, 3])
def test_label_of_the_hierarchy_is_the_leaf_of_the_largest_score(depth: int) -> None:
    task = Task(k=1, d=2**depth - 1, depth=depth)
    x, right = signs(task.d), task.right_of()
    scores = torch.zeros(len(x), task.num_classes)
    for leaf in range(task.num_classes):
        node = 0
        for level in reversed(range(depth)):  # the original's definition: products of all ancestors, signed
            goes_right = leaf >> level & 1
            scores[:, leaf] += (-1 if goes_right else 1) * x[:, task.supports[node]].prod(1)
            assert right[leaf, node] == goes_right
            node = 2 * node + 1 + goes_right
    assert torch.equal(task.labels(x), scores.argmax(1))
    assert (scores.max(1).values == depth).all()


def test_samples_are_fresh_in_every_block_and_stream_and_the_same_for_ever() -> None:
    blocks = [samples(Task(20, 4), *key, 500) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))]
    for one, other in itertools.combinations(blocks, 2):
        assert 0.45 < (one == other).float().mean() < 0.55
    assert all(set(block.unique().tolist()) == {-1.0, 1.0} for block in blocks)
    first_ever = [[-1, 1, -1, -1, 1], [1, -1, 1, -1, 1], [1, -1, -1, -1, 1]]
    assert samples(Task(5, 1), seed=7, stream=2, block=1, num=3).tolist() == first_ever


# ------------------------------------------------------------------------------------------------ networks


def test_mlp_is_that_of_torch() -> None:
    task = Task(6, 2)
    params = stacked(MODELS["mlp"], task, 5, 0.02, [torch.Generator().manual_seed(s) for s in (1, 2)])
    x_SND = torch.randn(2, 7, 6)
    logits = MODELS["mlp"].forward(params, x_SND)
    for seed in range(2):
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        for ours, parameter in zip(
            ("in.weight", "in.bias", "out.weight", "out.bias"), net.parameters(), strict=True
        ):
            parameter.data = params[ours][seed].reshape(parameter.shape)
        torch.testing.assert_close(logits[seed], net(x_SND[seed]))


def test_mlp_starts_as_torch_starts_its_layers() -> None:
    net = MODELS["mlp"].init(Task(25, 2), 1000, 0.02, torch.Generator().manual_seed(0))
    for name, fan_in in (("in.weight", 25), ("in.bias", 25), ("out.weight", 1000)):
        bound = fan_in**-0.5
        assert 0.98 * bound < net[name].abs().max() <= bound
        assert net[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)  # uniform


def test_transformer_starts_with_the_spread_that_is_asked_for() -> None:
    net = MODELS["transformer"].init(Task(25, 2), 64, 0.1, torch.Generator().manual_seed(0))
    for name in ("position", "0.qkv.weight", "1.up.weight"):
        assert net[name].std().item() == pytest.approx(0.1, rel=0.05)
    for name in ("0.proj.weight", "1.down.weight"):  # as GPT-2 does, over the root of its residual branches
        assert net[name].std().item() == pytest.approx(0.05, rel=0.05)


def test_transformer_is_gpt2_of_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    task, width = Task(5, 2), 16
    params = stacked(
        MODELS["transformer"], task, width, 0.02, [torch.Generator().manual_seed(s) for s in (1, 2)]
    )
    for name, tensor in params.items():  # nothing at its starting value of 0 or 1
        params[name] = tensor + 0.1 * torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(len(name))
        )
    config = GPT2Config(
        vocab_size=2, n_positions=5, n_embd=width, n_layer=2, n_head=2, tie_word_embeddings=False
    )
    x_SND = signs(5)[:9].repeat(2, 1, 1)
    logits = MODELS["transformer"].forward(params, x_SND)
    for seed in range(2):
        gpt2 = GPT2LMHeadModel(config).eval()
        load_gpt2(gpt2, {name: tensor[seed] for name, tensor in params.items()})
        expected = gpt2(((1 - x_SND[seed]) / 2).long()).logits[:, -1] + params["out.bias"][seed]
        torch.testing.assert_close(logits[seed], expected, atol=1e-5, rtol=1e-5)


def load_gpt2(gpt2: Any, net: Params) -> None:
    names = {"norm1": "ln_1", "qkv": "attn.c_attn", "proj": "attn.c_proj"}
    names |= {"norm2": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    state = {
        "transformer.wte.weight": net["token"],
        "transformer.wpe.weight": net["position"],
        "lm_head.weight": net["out.weight"].T,
    }
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = net[f"norm.{part}"].squeeze(0)
        for layer, (ours, theirs) in itertools.product(range(2), names.items()):
            tensor = net[f"{layer}.{ours}.{part}"]
            state[f"transformer.h.{layer}.{theirs}.{part}"] = (
                tensor if tensor.shape[0] > 1 else tensor.squeeze(0)
            )
    gpt2.load_state_dict(state)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = stacked(MODELS[name], Task(4, 2), 8, 0.02, [torch.Generator().manual_seed(0)])
    x_SND = signs(4)[None]
    whole = logits_of(MODELS[name], params, x_SND, 8)
    monkeypatch.setattr("distill.experiments.parity.models.CHUNK_FLOATS", 24)
    torch.testing.assert_close(logits_of(MODELS[name], params, x_SND, 8), whole)


def population(seeds: list[int], copies: int, model: str = "mlp", optimizer: str = "sgd") -> Population:
    settings = Settings(**{**vars(TINY), "seeds": seeds, "model": model, "optimizer": optimizer})
    return Population(settings, settings.student, STUDENT, CPU, copies)


@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "sgd"), ("transformer", "adam")])
def test_networks_side_by_side_learn_as_if_alone(model: str, optimizer: str) -> None:
    together, alone = population([0, 3], 2, model, optimizer), population([3], 1, model, optimizer)
    for _ in range(2):
        together.train(together.next_block(), LABELS_ALONE)
        alone.train(alone.next_block(), LABELS_ALONE)
    for name in alone.params:
        for copy in range(2):
            torch.testing.assert_close(together.network(2 * copy + 1)[name], alone.network(0)[name])
    assert together.validate()["loss"][1][1] == pytest.approx(alone.validate()["loss"][0][0])


def test_a_lesson_reaches_its_own_networks_alone() -> None:
    nets, labels = population([0, 3], 2), population([0, 3], 2)
    x_TSBD = nets.next_block()
    teacher_TGBC = torch.randn(5, 4, 8, 2, generator=torch.Generator().manual_seed(0))
    nets.train(x_TSBD, [Lesson(slice(0, 2), None), Lesson(slice(2, 4), 1.0)], teacher_TGBC)
    labels.train(x_TSBD, LABELS_ALONE)
    differ = [not torch.equal(nets.network(i)["in.weight"], labels.network(i)["in.weight"]) for i in range(4)]
    assert differ == [False, False, True, True]


def test_a_step_is_plain_sgd_on_the_mean_of_the_batch() -> None:
    nets = population([3], 1)
    x_TSBD = nets.next_block()
    before = {name: tensor.clone().requires_grad_() for name, tensor in nets.network(0).items()}
    logits = MODELS["mlp"].forward({name: tensor[None] for name, tensor in before.items()}, x_TSBD[0])
    nn.functional.cross_entropy(logits[0], nets.settings.task.labels(x_TSBD[0, 0])).backward()
    nets.train(x_TSBD[:1], LABELS_ALONE)
    for name, tensor in before.items():
        torch.testing.assert_close(nets.network(0)[name], (tensor - 0.1 * tensor.grad).detach())


# ------------------------------------------------------------------------------------------------ probe


def test_probe_finds_the_monomials_of_a_known_network_and_no_others() -> None:
    probe = FourierProbe(Task(10, 4), 20_000, seed=0)
    right = 0.3 * probe.x_ND[:, 0] + 0.2 * probe.x_ND[:, 1] * probe.x_ND[:, 2]  # of P(class 1) - 1/2
    found = probe.correlations(
        torch.stack([torch.zeros_like(right), (0.5 + right).clamp(0.01, 0.99).logit()], -1)
    )
    assert found["inside"][1] == pytest.approx(0.3 / 4, abs=0.01)  # one of four sets
    assert found["inside"][2] == pytest.approx(0.2 / 6, abs=0.01)
    assert max(found["outside"].values()) < 0.01
    assert found["inside"][3] < 0.01


def test_sets_off_the_support_are_none_of_those_inside() -> None:
    probe = FourierProbe(Task(6, 3), 100, seed=0)
    assert {m: len(sets) for m, sets in probe._outside.items()} == {1: 3, 2: 12}


# ------------------------------------------------------------------------------------------------ trajectories


@pytest.fixture(scope="module")
def tiny_trajectories(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    """Steps 5, 10, 15, 20 of two tiny teachers; never written to."""
    return train_teachers(tmp_path_factory.mktemp("tiny"), TINY, CPU)[1]


def test_a_teacher_leaves_a_trajectory_whose_last_checkpoint_is_its_end(tmp_path: Path) -> None:
    curve, trajectories = train_teachers(tmp_path, TINY, CPU)
    own = Population(TINY, TINY.teacher, TEACHER, CPU)
    own.load(tmp_path / "teachers", {})
    for i, trajectory in enumerate(trajectories):
        reopened = open_trajectory(trajectory.root, 2)
        assert (reopened.steps, reopened.manifest.complete) == ([5, 10, 15, 20], True)
        last = reopened.read(20, describe_net(TINY, TINY.teacher))
        assert all(torch.equal(last[name], own.network(i)[name]) for name in last)
        assert reopened.losses == {s: row[i] for s, row in zip(curve.steps, curve.loss, strict=True)}


def test_teachers_say_what_the_checkpoint_of_the_schedule_says(tiny_trajectories: list[Trajectory]) -> None:
    unlike = [ScheduleConfig("one_shot", checkpoints=[5]), ScheduleConfig("one_shot")]
    teachers = Teachers(TINY, [None, [ScheduleConfig("speed")] * 2, unlike], tiny_trajectories, CPU)
    assert teachers.follow(5 * 8) == [None, [10, 10], [5, 20]]
    x_TSBD = population([0, 3], 1).next_block()
    logits = teachers.logits(x_TSBD)
    assert logits.shape == (5, 6, 8, 2)
    assert not logits[:, :2].any()
    for network, (seed, step) in {2: (0, 10), 3: (1, 10), 4: (0, 5), 5: (1, 20)}.items():
        net = tiny_trajectories[seed].read(step, describe_net(TINY, TINY.teacher))
        expected = MODELS["mlp"].forward({name: t[None] for name, t in net.items()}, x_TSBD[4, seed][None])
        torch.testing.assert_close(logits[4, network], expected[0])


def test_a_stage_that_starts_between_two_validations_is_refused(tiny_trajectories: list[Trajectory]) -> None:
    off = [ScheduleConfig("explicit", stages=[[0, 5], [7, 20]])] * 2
    with pytest.raises(ValueError, match="starts at step 7: it must be a multiple of every=5"):
        Teachers(TINY, [off], tiny_trajectories, CPU)


def test_an_adaptive_schedule_goes_on_by_the_students_own_accuracy(
    tiny_trajectories: list[Trajectory],
) -> None:
    teachers = Teachers(TINY, [None, [ScheduleConfig("saturation", patience=1)] * 2], tiny_trajectories, CPU)
    for step, accuracies in ((5, [0.5, 0.5]), (10, [0.5, 0.9]), (15, [0.5, 0.9])):
        teachers.note(step * 8, [[0.0, 0.0], accuracies])
    assert teachers.follow(15 * 8) == [None, [15, 10]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda t: (t.folder(10) / "model.safetensors").unlink(),
            "teacher step 10: .*is missing or not the file",
        ),
        (
            lambda t: (t.folder(10) / "model.safetensors").write_bytes(b"x"),
            "missing or not the file of the manifest",
        ),
        (lambda t: t.manifest.checkpoints.pop(10), r"no teacher step 10; it has \[5, 15, 20\]"),
    ],
)
def test_a_checkpoint_that_is_not_the_one_written_is_refused(damage: Any, said: str, tmp_path: Path) -> None:
    trajectory = train_teachers(tmp_path, TINY, CPU)[1][0]
    damage(trajectory)
    with pytest.raises(BadTrajectory, match=said):
        trajectory.read(10, describe_net(TINY, TINY.teacher))


def test_a_checkpoint_of_another_architecture_is_refused(tiny_trajectories: list[Trajectory]) -> None:
    with pytest.raises(
        BadTrajectory, match="another network .width: 16, asked for 99.: choose another --out"
    ):
        tiny_trajectories[0].read(10, describe_net(TINY, Net(99, 20)))


# ------------------------------------------------------------------------------------------------ the study


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, dict[str, Curve], list[Any], list[Arm]]:
    """A short R1 at temperature 0: teachers, students by arm, picks, arms."""
    out = tmp_path_factory.mktemp("short")
    teachers, trajectories = train_teachers(out, SHORT, CPU)
    picks = pick_checkpoints(SHORT, teachers)
    arms = make_arms(SHORT, picks)
    return teachers, train_students(out, SHORT, arms, trajectories, CPU), picks, arms


def test_one_shot_from_a_perfect_teacher_at_temperature_0_is_the_run_on_hard_labels_to_the_bit(
    short: Any,
) -> None:
    teachers, students, _, _ = short
    assert min(teachers.accuracy[-1]) == 1.0
    assert students["one_shot_t0"] == students["hard"]
    assert students["progressive_t0"] != students["hard"]


def test_progressive_and_a_checkpoint_inside_the_transition_reach_every_seed_and_inside_is_ahead_of_labels(
    short: Any,
) -> None:
    _, students, _, _ = short
    reached = {name: students[name].steps_to(0.95) for name in ("hard", "progressive_t0", "inside_t0")}
    assert None not in reached["progressive_t0"] + reached["inside_t0"]
    assert all(
        hard is None or inside < hard
        for inside, hard in zip(reached["inside_t0"], reached["hard"], strict=True)
    )


def test_a_students_accuracy_under_an_early_teacher_is_that_teachers(short: Any) -> None:
    teachers, students, picks, _ = short
    at_switch = students["inside_t0"].accuracy[SHORT.early_steps // SHORT.every - 1]
    for i, pick in enumerate(picks):
        of_teacher = teachers.accuracy[teachers.steps.index(pick.inside)][i]
        assert at_switch[i] == pytest.approx(of_teacher, abs=0.1)


def test_the_table_and_the_claims_tell_every_seed(short: Any) -> None:
    teachers, students, picks, arms = short
    lines = table(arms, students, teachers).splitlines()
    assert len(lines) == 3 + len(arms)
    assert lines[3].startswith("| hard labels |  | ")
    assert ", ".join(f"{a:.3f}" for a in students["hard"].accuracy[-1]) in lines[3]
    correlations = [
        {2000: flat, **{s: flat for s in vars(p).values()}} for p in picks for flat in [even(SHORT)]
    ]
    found = {c["claim"]: c for c in claims(SHORT, picks, students, teachers, correlations)}
    assert found["one-shot at temperature 0 is the run on hard labels, to the bit, at every validation"][
        "holds"
    ]
    assert not next(c for claim, c in found.items() if "at least 3 x" in claim)["holds"]


def test_labels_that_arrive_within_one_and_a_half_times_the_teachers_steps_refute_the_claim(
    short: Any,
) -> None:
    teachers, students, picks, _ = short
    own = teachers.steps_to(0.95)
    flat = even(SHORT)
    correlations = [{2000: flat, **{s: flat for s in vars(p).values()}} for p in picks]
    for step, holds in ((int(1.4 * min(own)), False), (int(1.6 * max(own)), True)):
        hard = Curve([step], [[1.0, 1.0]], [[0.0, 0.0]])
        found = claims(SHORT, picks, {**students, "hard": hard}, teachers, correlations)
        assert next(c for c in found if c["claim"].startswith("hard: no seed"))["holds"] == holds


def test_a_support_of_all_coordinates_has_nothing_outside() -> None:
    found = FourierProbe(Task(3, 3), 50, 0).correlations(torch.zeros(50, 2))
    assert set(found["inside"]) == {1, 2} and all(math.isnan(value) for value in found["outside"].values())


def even(settings: Settings) -> dict[str, dict[int, float]]:
    return {where: {m: 0.1 for m in range(1, settings.k)} for where in ("inside", "outside")}


def flat_curve(*accuracies: float) -> Curve:
    return Curve(
        [5 * (i + 1) for i in range(len(accuracies))],
        [[a, a] for a in accuracies],
        [[1.0, 1.0]] * len(accuracies),
    )


def test_teachers_without_a_phase_transition_are_refused_with_what_to_change() -> None:
    with pytest.raises(
        ValueError, match=r"seed 0 ends at accuracy 0.600, not at 0.995: raise teacher.steps=20"
    ):
        pick_checkpoints(TINY, flat_curve(0.5, 0.5, 0.6))
    with pytest.raises(ValueError, match="half-way at step 5 and perfect at 5"):
        pick_checkpoints(TINY, flat_curve(1.0, 1.0))


def test_steps_to_an_accuracy_are_those_of_the_first_validation_that_has_it() -> None:
    curve = Curve([10, 20, 30], [[0.5, 0.96], [0.96, 0.5], [0.5, 0.5]], [[0.0, 0.0]] * 3)
    assert curve.steps_to(0.95) == [20, 10]
    assert curve.steps_to(0.99) == [None, None]


# ------------------------------------------------------------------------------------------------ resume, command


class Stop(Exception):
    """Ends a run where a kill could."""


@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "sgd"), ("transformer", "adam")])
def test_a_run_cut_off_goes_on_to_the_same_bits(
    model: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**{**vars(TINY), "model": model, "optimizer": optimizer})
    arms = [Arm("hard", "h"), Arm("adaptive", "a", [ScheduleConfig("saturation", patience=1)] * 2, 1.0)]
    _, trajectories = train_teachers(tmp_path / "whole", settings, CPU)
    whole = train_students(tmp_path / "whole", settings, arms, trajectories, CPU)

    monkeypatch.setattr("distill.experiments.parity.runs.SECONDS_BETWEEN_SAVES", 0.0)
    validate, calls = Population.validate, iter(range(100))

    def stopping(self: Population) -> dict[str, Any]:
        if next(calls) == 2:
            raise Stop
        return validate(self)

    for train in (
        lambda: train_teachers(tmp_path / "cut", settings, CPU),
        lambda: train_students(tmp_path / "cut", settings, arms, trajectories, CPU),
    ):
        calls = iter(range(100))
        monkeypatch.setattr(Population, "validate", stopping)
        with pytest.raises(Stop):
            train()
        monkeypatch.setattr(Population, "validate", validate)
        found = train()
    assert found == whole
    for seed in ("seed0", "seed3"):
        files = [sorted((tmp_path / name / "teachers" / seed).rglob("*.*")) for name in ("whole", "cut")]
        assert [p.read_bytes() for p in files[0] if p.is_file()] == [
            p.read_bytes() for p in files[1] if p.is_file()
        ]


def test_a_folder_of_another_study_is_refused_with_the_difference(tmp_path: Path) -> None:
    train_teachers(tmp_path, TINY, CPU)
    other = Settings(**{**vars(TINY), "batch_size": 4})
    with pytest.raises(BadState, match="batch_size: 8 -> 4.: choose another --out"):
        train_teachers(tmp_path, other, CPU)


def test_a_run_from_before_a_setting_existed_had_its_default(tmp_path: Path) -> None:
    left = population([0], 1)
    left.save(tmp_path, {"d": 6})
    left.load(tmp_path, {"d": 6, "initializer_range": 0.02})
    with pytest.raises(BadState, match="initializer_range: 0.02 -> 0.1"):
        left.load(tmp_path, {"d": 6, "initializer_range": 0.1})


def test_the_command_interrupted_goes_on_to_table_figures_and_picture_and_prints_them_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY_ARGUMENTS, "--out", str(tmp_path / "run")]
    follow = Teachers.follow

    def interrupted(self: Teachers, consumed: int) -> list[list[int] | None]:
        if consumed >= 40 * 32:
            raise KeyboardInterrupt
        return follow(self, consumed)

    monkeypatch.setattr(Teachers, "follow", interrupted)
    assert main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(Teachers, "follow", follow)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| 2-shot, inside the transition | 0 |" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["arms"]["hard"]["steps"]) == 16
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr(Population, "train", None)  # nothing is left to train
    assert main(command) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["k=61"], "k must lie in 1 to d=60, got 61: lower k or raise d"),
        (["depth=3", "k=10"], "7 nodes of k=10 coordinates each, more than d=60: raise d to 70"),
        (["model=cnn"], "model must be one of mlp, transformer, got 'cnn'"),
        (["model=transformer", "student.width=20"], "a Transformer's width must be a multiple of 8"),
        (["initializer_range=0"], "initializer_range must be above 0, got 0"),
        (["early_steps=300"], "must be multiples of every=200"),
        (["seeds=[1, 1]"], "seeds must be different numbers"),
        (["temperatures=[-1]"], "temperatures must not be negative"),
        (["temperatures=[0,0.0]"], "temperatures must be different numbers"),
        (["early_distance=-200"], "early_distance must be above 0, got -200"),
        (["teacher.stepz=1"], "unknown key teacher.stepz; did you mean teacher.steps?"),
        (["lr=1"], "did you mean student.optim.lr?"),
    ],
)
def test_bad_settings_are_refused_with_what_to_change(
    assignments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(assignments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "distill/configs/sparse_parity").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_setting_loads(path: Path) -> None:
    load_settings([path], [])


def test_all_problems_of_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        load_settings([], ["k=0", "model=x", "seeds=[]"])
    assert len(refusal.value.problems) == 3


def test_learning_rate_falls_as_configured() -> None:
    net = Net(8, 10, OptimConfig(lr=0.5, warmup_share=0.0, decay="cosine"))
    nets = Population(TINY, net, STUDENT, CPU)
    nets.train(nets.next_block(), LABELS_ALONE)
    assert nets.optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * (1 + np.cos(np.pi * 0.4)))
