"""All parts of a run, built from its config; whatever does not fit together is refused here."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from data_prep.shards import TokenizerInfo
from distill import hardware
from distill.checkpoint import TrainState
from distill.config import Config, ScheduleConfig
from distill.data import Batch, Samples
from distill.distributed import World, agree_on_stop
from distill.engine import Engine
from distill.ensemble import Ensemble
from distill.evaluate import validation_samples
from distill.growing import Growing
from distill.models import (
    DTYPES,
    PLAIN,
    build_model,
    check_split,
    num_parameters,
    quiet_transformers,
    use_plain_attention,
)
from distill.objectives import Objective, weights_at
from distill.objectives.terms import Gives, check_terms, learned_modules, needs_of
from distill.pretrained import load_model, pick_layers
from distill.probes.quality import word_buckets
from distill.retokenize import Retokenizer
from distill.run_folder import Scheduled, read_schedule, store_schedule
from distill.schedule import Schedule, follow_student, make_schedule, together
from distill.signals import Cancelled, Stopped, stop_signal
from distill.speculative import continued, corrected_pairs
from distill.stored_teacher import StoredTeacher
from distill.teacher import Teacher
from distill.trajectory.audit.verdicts import refuse_bad_steps
from distill.trajectory.manifest import BadTrajectory, Manifest, load_manifest
from distill.trajectory.nodes import load_alike
from distill.trajectory.publish import Publisher, object_storage
from distill.trajectory.store import open_store

log = logging.getLogger(__name__)
LEAST_SHARED = 0.1  # of the tokens, that end together: two tokenizers of one language share two thirds


@dataclass
class Run:
    """All parts of a run, built."""

    config: Config
    world: World
    folder: Path
    samples: Samples
    validation: Samples
    engine: Engine
    objective: Objective
    micro: int
    schedule: Schedule | None
    teacher: Teacher | Ensemble | StoredTeacher | None
    trajectory: Scheduled | None  # that teaches
    growing: Growing | StoredTeacher | None  # the same while its run may not have ended
    publisher: Publisher | None  # of the trajectory that this run leaves
    reference: PreTrainedModel | None  # what the student was at the start, where an objective asks
    # For the next step, and will not get it: there was a signal, or a fault of storage.
    lacks_teacher: bool = False

    @property
    def vocab_size(self) -> int:
        return self.samples.tokenizer.vocab_size

    @property
    def tokenizer(self) -> Path:
        return Path(self.config.data.shards) / "tokenizer"

    def await_teacher(self, consumed: int) -> float:
        """Wait for the weights that teach the next sample, of a teacher that may still train. Seconds waited.

        A stop signal makes it return before. `lacks_teacher` tells whether they are not there.
        """
        if self.teacher is None or self.schedule is None or consumed >= self.schedule.total_samples:
            return 0.0
        start = time.perf_counter()
        if self.growing:
            self.schedule = self.growing.settle(self.schedule, consumed)
        settled = self.schedule.is_settled(self.schedule.stage_index(consumed))
        self.lacks_teacher = not (settled and self.teacher.await_next(self.schedule, consumed))
        return time.perf_counter() - start

    def questions(self, micro_batches: list[Batch], state: TrainState) -> list[Batch]:
        """What is asked in this step: the texts, or the student's continuations of them, by its share of the budget."""
        objective, share = self.config.objective, state.step / self.config.steps
        in_pairs = weights_at(objective, share).get("preference", 0.0) > 0
        if share < objective.speculate_from and not in_pairs:
            return micro_batches
        assert isinstance(self.teacher, Teacher) and self.teacher.model, (
            "the config names a teacher, and the schedule has begun"
        )
        models = (self.engine.model, self.teacher.model)
        settings = (objective.speculate_top_k, self.vocab_size, self.samples.tokenizer.pad_id)
        there = [batch.to(self.world.device) for batch in micro_batches]
        if in_pairs:
            assert self.reference is not None, "the objective asks for it"
            return [corrected_pairs(batch, *models, self.reference, *settings) for batch in there]
        return [continued(batch, *models, *settings) for batch in there]

    def follow_schedule(self, consumed: int) -> float:
        """Let the checkpoint teach that rules after `consumed` samples. Seconds waited for it.

        Raises Stopped where a signal came while it was waited for.
        """
        if self.teacher is None or self.schedule is None or consumed >= self.schedule.total_samples:
            return 0.0
        waited = self.await_teacher(consumed)
        try:
            if self.schedule.is_settled(self.schedule.stage_index(consumed)):
                return waited + self.teacher.follow(self.schedule, consumed)
        except Cancelled:
            pass
        raise Stopped(agree_on_stop(stop_signal(), self.world), consumed // self.schedule.batch_size)

    def close(self) -> None:
        """Give up what works beside the loop."""
        if self.teacher:
            self.teacher.close()
        if self.publisher:
            self.publisher.close()

    def follow_student(self, state: TrainState, accuracy: float) -> None:
        """Let a validation's top-1 advance a schedule that waits for the student. On disk before it takes effect.

        All ranks have the same sums, hence the same decision.
        """
        if self.schedule is None or self.trajectory is None or self.config.schedule.kind != "saturation":
            return
        before = self.schedule
        self.schedule, state.gained = follow_student(
            before, self.config.schedule, state.consumed, state.gained, accuracy
        )
        if self.schedule != before and self.world.is_main:
            teacher = self.schedule.checkpoint_at(state.consumed)
            log.info("step %d: the student has stopped gaining, teacher step %d teaches", state.step, teacher)
            store_schedule(self.folder, self.schedule, self.trajectory)


AnyTeacher = Teacher | Ensemble | StoredTeacher
Taught = tuple[Schedule | None, AnyTeacher | None, Scheduled | None, Growing | StoredTeacher | None]


def build_run(config: Config, world: World, folder: Path) -> Run:
    """Build every part of the run in `folder`. Raises ValueError (and its kinds) for what can't be trained on."""
    quiet_transformers()
    samples = train_samples(config)
    micro, accumulation = layout(config, world)
    needs = needs_of(config.objective.weights)
    schedule, teacher, trajectory, growing = make_teacher(config, world, folder, samples)
    check_terms(config.objective, samples.tokenizer.vocab_size, *given_by(teacher))
    if schedule and world.is_main:
        log.info("teacher schedule\n%s", schedule.table())
        if config.schedule.kind == "two_shot" and not config.schedule.checkpoints:
            log.info("the early checkpoint is where the loss falls fastest, which may be the fall to word frequencies: "
                     "`distill probe --suggest-schedule` judges by more, and schedule.checkpoints=[EARLY] names one")  # fmt: skip
    model = student_model(config, samples)
    log.info("model: %s, %.2f M parameters", model.config.model_type, num_parameters(model) / 1e6)
    model.to(device=world.device)  # type: ignore[call-arg]  # transformers wraps Module.to untyped
    if PLAIN & needs:
        use_plain_attention(model)
    warn_of_emulation(config, world)
    learned = beside_student(config, model, teacher, schedule)
    engine = Engine(model, config, world, accumulation, learned)
    buckets = word_buckets(samples).to(world.device) if "words" in needs else None
    objective = Objective(config.objective, samples.tokenizer.vocab_size, bucket_V=buckets)
    publisher = None
    if config.save.trajectory_every:
        publisher = own_trajectory(config, world, folder, model.config, samples.tokenizer)
    validation = validation_samples(config)
    return Run(
        config,
        world,
        folder,
        samples,
        validation,
        engine,
        objective,
        micro,
        schedule,
        teacher,
        trajectory,
        growing,
        publisher,
        starting_model(config, samples, world) if "reference" in needs else None,
    )


def train_samples(config: Config) -> Samples:
    """What the run trains on; beside it the same texts for its teacher, where that has another tokenizer.

    Raises:
        ValueError: that tokenizer is not one, or cuts the texts nowhere as the shards' does.
    """
    samples = Samples(config.data, "train", config.seed, shuffle=True)
    if config.teacher.tokenizer:
        samples.retokenizer = Retokenizer(
            Path(config.data.shards), samples.tokenizer, Path(config.teacher.tokenizer)
        )
        first = samples[np.arange(min(len(samples), 16))]
        assert first.retold is not None
        share = len(first.retold.rows_M) / max(len(first.rows_N), 1)
        if share < LEAST_SHARED:
            raise ValueError(
                f"teacher.tokenizer={config.teacher.tokenizer}: of {len(first.rows_N)} tokens {share:.0%} end where one of "
                f"{config.data.shards} does: is it a tokenizer for such text?"
            )
        log.info("of the tokens that count %.0f %% end where one of the teacher's does", 100 * share)
    return samples


def beside_student(
    config: Config, model: PreTrainedModel, teacher: AnyTeacher | None, schedule: Schedule | None
) -> dict[str, nn.Module]:
    """What the objective learns beside the student, on the student's device."""
    names, width = config.objective.weights, 0
    if "width" in needs_of(names) and schedule and isinstance(teacher, (Teacher, StoredTeacher)):
        width = teacher.width(schedule.checkpoint_at(0))
    learned = learned_modules(names, model.config.hidden_size, width, config.seed)
    return {name: module.to(model.device) for name, module in learned.items()}


def warn_of_emulation(config: Config, world: World) -> None:
    """Say so where a CPU makes 16-bit matrix products in software."""
    for key, name in (("engine.dtype", config.engine.dtype), ("teacher.dtype", config.teacher.dtype)):
        used = key == "engine.dtype" or config.teacher.trajectory
        if (
            used
            and world.is_main
            and world.device.type == "cpu"
            and not hardware.cpu_multiplies(DTYPES[name])
        ):
            log.warning(
                "this CPU has no %s matrix products and is many times slower at them: %s=fp32", name, key
            )


def make_teacher(config: Config, world: World, folder: Path, samples: Samples) -> Taught:
    """Who teaches the run in `folder`, and when: nobody, targets that were scored, or a trajectory."""
    if config.teacher.targets:
        stored = StoredTeacher(config, samples, world)
        schedule = read_schedule(folder, stored.header) or stored.schedule
        return schedule, stored, stored.header, stored if config.teacher.unfinished == "wait" else None
    if not config.teacher.trajectory:
        return None, None, None, None
    trajectory = load_alike(config.teacher.trajectory, world)
    schedule = read_schedule(folder, trajectory) or first_schedule(config, trajectory)
    size, known = config.teacher.ensemble, trajectory.checkpoints
    teaching = {stage.checkpoint for stage in schedule.stages}
    refuse_bad_steps(
        trajectory, teaching if size == 1 else {s for step in teaching for s in together(step, known, size)}
    )
    kind = Teacher if size == 1 else Ensemble
    spoken = samples.retokenizer.info if samples.retokenizer else samples.tokenizer
    teacher = kind(trajectory, config, spoken, samples.sequence_length, world)
    growing = Growing(trajectory, config.teacher.unfinished, folder, world) if schedule.unsettled else None
    return schedule, teacher, trajectory, growing


def given_by(teacher: AnyTeacher | None) -> tuple[Gives, str]:
    """What the teacher shows to objectives, and why it is not all."""
    if isinstance(teacher, Ensemble):
        return "buckets", "several models teach together"
    if not isinstance(teacher, StoredTeacher):
        return "all", ""
    codec = teacher.header.codec
    gives: Gives = "hidden" if codec.is_exact else "draws" if codec.draws else "buckets"
    return gives, f"its targets are stored ({codec})"


def first_schedule(config: Config, trajectory: Manifest) -> Schedule:
    """The schedule of a run that starts; one that goes on keeps it, even if the trajectory has grown.

    Raises:
        BadTrajectory: the teacher's own run has not ended, and the schedule would take its newest checkpoint
            for the final one.
    """
    named = named_teachers(config.schedule)
    if not trajectory.complete and not named:
        raise BadTrajectory(
            f"{trajectory.url}: the teacher's run has not ended, its newest checkpoint is "
            f"step {max(trajectory.checkpoints, default=0)}: let it end, or name every teacher step that "
            "schedule.kind needs in schedule.checkpoints (two_shot: both; explicit: in schedule.stages)"
        )
    grows = not trajectory.complete and config.teacher.unfinished != "refuse"
    available = sorted({*trajectory.checkpoints, *(named if grows else [])})
    schedule = make_schedule(config.schedule, available, trajectory.losses, config.steps, config.batch_size)
    return dataclasses.replace(schedule, unsettled=len(schedule.stages)) if grows else schedule


def named_teachers(schedule: ScheduleConfig) -> list[int]:
    """All teacher steps of the schedule, if the config alone decides them; a longer trajectory changes nothing then."""
    if schedule.kind == "explicit":
        return [checkpoint for _, checkpoint in schedule.stages]
    enough = 2 if schedule.kind == "two_shot" else 1
    return schedule.checkpoints if len(schedule.checkpoints) >= enough else []


def layout(config: Config, world: World) -> tuple[int, int]:
    """(sequences a micro-batch, micro-batches a step) of one rank.

    Raises:
        ValueError: the batch does not divide.
    """
    share, remainder = divmod(config.batch_size, world.size)
    micro = config.micro_batch_size or share
    if remainder or share % micro:
        raise ValueError(
            f"batch_size {config.batch_size} must be {world.size} rank(s) x micro_batch_size {micro} x a whole number"
        )
    return micro, share // micro


def student_model(config: Config, samples: Samples) -> PreTrainedModel:
    """The model to train: new from the seed, or loaded. Same seed, same weights, whatever the teacher."""
    tokenizer = samples.tokenizer
    if config.model.init_from:
        model = load_model(
            config.data.task, Path(config.model.init_from), torch.float32, samples.sequence_length
        )
        if config.model.init_layers:
            model = pick_layers(config.data.task, model, config.model.init_layers)
    else:
        begin, end = tokenizer.bos_id, tokenizer.eos_id
        specials = {
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": begin,
            "eos_token_id": end,
            "cls_token_id": begin,
            "sep_token_id": end,
        }
        model = build_model(
            config.data.task,
            config.model.architecture,
            config.model.overrides,
            vocab_size=tokenizer.vocab_size,
            sequence_length=samples.sequence_length,
            special_ids=specials,
            seed=config.seed,
        )
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model has {model.config.vocab_size} logits, the shards' tokenizer {tokenizer.vocab_size} tokens"
        )
    check_split(model)
    return model


def starting_model(config: Config, samples: Samples, world: World) -> PreTrainedModel:
    """What the run starts from, frozen, in the dtype of training; the same after a resume."""
    model = student_model(config, samples).requires_grad_(False).eval()
    return model.to(device=world.device, dtype=DTYPES[config.engine.dtype])


def own_trajectory(
    config: Config, world: World, folder: Path, model: PretrainedConfig, tokenizer: TokenizerInfo
) -> Publisher:
    """The trajectory that this run leaves: new, or as it stands when the run goes on. Rank 0 alone publishes it.

    Raises ValueError where save.trajectory_to is no object storage: on all ranks, or the others would wait for one.
    """
    store = object_storage(config.save.trajectory_to) if config.save.trajectory_to else None
    root = folder / "trajectory"
    if (root / "manifest.json").exists():
        own = load_manifest(root)
    else:
        root.mkdir(exist_ok=True)
        own = Manifest(open_store(root), "distill", model.model_type, model.vocab_size, tokenizer.sha256)
    return Publisher(own, store if world.is_main else None)
