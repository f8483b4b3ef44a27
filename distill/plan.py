"""What a run will need and cost, before it starts: no GPU, no weights, no data are touched.

`make_plan` reads the index of the shards and the manifest of the trajectory where they exist, and builds both models
without memory (torch's meta device).
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from data_prep.shards import INDEX_NAME, ShardIndex
from distill.config import Config
from distill.memory import (
    BYTES,
    RankMemory,
    activation_memory,
    host_memory,
    logits_memory,
    next_teacher_memory,
    student_memory,
    teacher_memory,
)
from distill.metrics import METRICS, read_rows
from distill.models import AUTO, PLAIN, build_model, flops_per_step, num_parameters, work_of
from distill.objectives import term_names
from distill.objectives.terms import TERMS, learned_modules, needs_of
from distill.schedule import Schedule, due_after, make_schedule, together
from distill.targets.codecs import bytes_a_row, make_codec
from distill.trajectory.manifest import NAME, Manifest, load_manifest


@dataclass(frozen=True)
class Site:
    """What the run would have: its machines, and what can't be read because it isn't there yet.

    tokens_per_second: of all ranks together; tflops: that one rank sustains (10^12 operations a second);
    storage_mb_per_second: that storage gives all nodes together, MB a second; 0: not known.
    vocab_size, sequence_length: for shards still to be made. teacher_config: config.json of a teacher still to be fetched.
    """

    ranks: int = 8
    ranks_per_node: int = 8
    memory_gib: float = 80.0
    tokens_per_second: float = 0.0
    tflops: float = 0.0
    storage_mb_per_second: float = 0.0
    vocab_size: int = 0
    sequence_length: int = 0
    teacher_config: Path | None = None

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Plan:
    """Everything that `plan_text` prints; bytes, seconds and parameters as numbers."""

    config: Config
    site: Site
    sequence_length: int
    student_parameters: int
    learned_parameters: int  # of the objective, beside the student
    teacher_parameters: int
    micro_batch_size: int
    memory: dict[int, RankMemory]  # by ZeRO stage
    host_optimizer_bytes: int  # of a rank's offloaded optimizer
    host_teacher_bytes: int  # of the checkpoint that waits for its turn
    schedule: Schedule | None
    checkpoint_bytes: dict[int, int]  # of the teacher steps that teach
    shard_bytes: int  # 0: still to be made
    most_shard_bytes: int  # of shards of which no sample is read twice
    saved_bytes: int  # resumable checkpoints, the one being written included
    trajectory_bytes: int  # that the run leaves
    target_bytes: dict[
        str, float
    ]  # of `distill score` for this run, by codec, before compression; empty: no teacher
    student_flops: float  # of one token, backward and terms of the objective included
    teacher_flops: float
    tokens_per_second: float
    speed_source: str

    @property
    def tokens(self) -> int:
        return self.config.total_samples * self.sequence_length

    @property
    def in_place(self) -> bool:
        """Whether every node reads all of the trajectory where it lies: a folder, and no cache to pass it on to."""
        return "://" not in self.config.teacher.trajectory and not self.config.teacher.cache

    @property
    def readers(self) -> int:
        """Nodes that read a byte of a checkpoint from storage; with a cache one does, and passes it on."""
        return self.site.nodes if self.in_place else 1

    @property
    def storage_bytes(self) -> int:
        """Read from storage by all nodes together."""
        return self.readers * sum(self.checkpoint_bytes.values())

    @property
    def seconds(self) -> float:
        """0 if no speed is known."""
        return self.tokens / self.tokens_per_second if self.tokens_per_second else 0.0

    @property
    def fetches(self) -> list[tuple[int, float]]:
        """(bytes of a checkpoint that all nodes read, seconds that the one before it teaches meanwhile), in order."""
        if self.schedule is None:
            return []
        a_sample = self.seconds / self.config.total_samples
        return [
            (
                self.readers * self.checkpoint_bytes[after.checkpoint],
                (after.first_sample - stage.first_sample) * a_sample,
            )
            for stage, after in itertools.pairwise(self.schedule.stages)
        ]

    @property
    def enough_mb_per_second(self) -> float:
        """From storage to all nodes together, so that no step waits for its teacher."""
        return max((size / 1e6 / seconds for size, seconds in self.fetches if seconds), default=0.0)

    @property
    def stall_seconds(self) -> float:
        """That all steps together wait for their teacher; the first, which the start waits for, is left out."""
        speed = self.site.storage_mb_per_second * 1e6
        return sum(max(size / speed - seconds, 0.0) for size, seconds in self.fetches) if speed else 0.0

    def fits(self, stage: int) -> bool:
        return self.memory[stage].total <= self.site.memory_gib * 2**30


def make_plan(config: Config, site: Site) -> Plan:
    """The plan of `config` on `site`.

    Raises:
        ValueError: the batch does not divide, or something is neither there to be read nor given; says what to give.
    """
    vocab_size, length, shard_bytes = _data(config, site)
    with torch.device("meta"):
        student = _student(config, vocab_size, length)
        teacher, schedule, checkpoint_bytes = _teacher(config, site)
    micro = _micro_batch_size(config, site)
    dtype = config.engine.dtype
    rows = micro * length if config.data.task == "clm" else round(micro * length * config.data.mask_rate)
    taught = config.teacher
    passing = (
        taught.ensemble
        * teacher_memory(teacher, taught.dtype, site.ranks, taught.zero_stage, taught.offload),
        activation_memory(student, micro, length, dtype, config.engine.activation_checkpointing)
        + _plain_attention(config, student, teacher, micro, length),
        logits_memory(student, rows, config.objective.chunk_rows, dtype, teacher is not None),
    )
    share = rows / (micro * length)
    student_flops = flops_per_step(work_of(student), 1, share, length, backward=True)
    student_flops += _term_flops(config, student, 0, share, length)
    teacher_flops = 0.0
    if teacher:
        teacher_flops = flops_per_step(work_of(teacher), 1, share, length, backward=False)
        teacher_flops = taught.ensemble * (teacher_flops + _term_flops(config, teacher, 1, share, length))
    with torch.device("meta"):
        width = teacher.config.hidden_size if teacher else student.config.hidden_size
        beside = learned_modules(config.objective.weights, student.config.hidden_size, width, config.seed)
    trained = nn.ModuleList([student, *beside.values()])
    numbers, offload = num_parameters(student), config.engine.offload_optimizer
    speed, source = _tokens_per_second(config, site, student_flops + teacher_flops)
    leaves = sum(due_after(step, config).leave_checkpoint for step in range(1, config.steps + 1))
    return Plan(
        config=config,
        site=site,
        sequence_length=length,
        student_parameters=numbers,
        learned_parameters=num_parameters(trained) - numbers,
        teacher_parameters=num_parameters(teacher) if teacher else 0,
        micro_batch_size=micro,
        memory={
            s: _with(student_memory(trained, s, dtype, site.ranks, offload=offload), *passing)
            for s in range(4)
        },
        host_optimizer_bytes=host_memory(trained, site.ranks) if offload else 0,
        host_teacher_bytes=taught.ensemble
        * next_teacher_memory(teacher, taught.dtype, site.ranks, taught.zero_stage, taught.offload),
        schedule=schedule,
        checkpoint_bytes=checkpoint_bytes,
        shard_bytes=shard_bytes,
        most_shard_bytes=config.total_samples * length * (2 if vocab_size <= 1 << 16 else 4),
        saved_bytes=(config.save.keep + 1)
        * num_parameters(trained)
        * (12 + (BYTES[dtype] if config.engine.zero_stage else 0)),
        trajectory_bytes=leaves * numbers * BYTES[dtype],
        target_bytes=_target_bytes(config, teacher, config.total_samples * length * share, vocab_size),
        student_flops=student_flops,
        teacher_flops=teacher_flops,
        tokens_per_second=speed,
        speed_source=source,
    )


def _term_flops(config: Config, model: PreTrainedModel, side: int, share: float, length: int) -> float:
    """Of one token, by all terms beside the fused pass. side: 0 for the student, 1 for the teacher."""
    work, terms = work_of(model), [TERMS[name] for name in term_names(config.objective)]
    a_trunk = flops_per_step(work._replace(head=0), 1, share, length, backward=False)
    a_head = 2.0 * share * work.head
    return sum(term.heads[side] * a_head + term.trunks[side] * a_trunk for term in terms)


def _plain_attention(
    config: Config, student: PreTrainedModel, teacher: PreTrainedModel | None, micro: int, length: int
) -> int:
    """Bytes of [B, H, L, L] a layer of both models, where an objective needs them: fp32, and in 16 bits once more."""
    if not PLAIN & needs_of(config.objective.weights):
        return 0
    models = [(student, config.engine.dtype), *([(teacher, config.teacher.dtype)] if teacher else [])]
    return sum(
        m.config.num_hidden_layers * m.config.num_attention_heads * (6 if dtype == "bf16" else 4)
        for m, dtype in models
    ) * (micro * length * length)


def _with(memory: RankMemory, teacher: int, activations: int, logits: int) -> RankMemory:
    held = (memory.weights, memory.optimizer, memory.gradients, memory.buckets)
    return RankMemory(*held, teacher, activations, logits)


def _data(config: Config, site: Site) -> tuple[int, int, int]:
    """(vocabulary, sequence length, bytes of the shards or 0 if they are still to be made)."""
    folder = Path(config.data.shards)
    if (folder / INDEX_NAME).exists():
        index = ShardIndex.load(folder)
        num_bytes = sum(shard.bytes for split in index.splits.values() for shard in split.shards)
        return index.tokenizer.vocab_size, index.sequence_length, num_bytes
    if not (site.vocab_size and site.sequence_length):
        raise ValueError(f"{folder} holds no shards yet: give --vocab-size and --sequence-length")
    return site.vocab_size, site.sequence_length, 0


def _student(config: Config, vocab_size: int, length: int) -> PreTrainedModel:
    if config.model.init_from:
        return _shape(config.data.task, _read(Path(config.model.init_from) / "config.json"))
    model, sizes = config.model, {"vocab_size": vocab_size, "sequence_length": length}
    return build_model(config.data.task, model.architecture, model.overrides, **sizes, special_ids={}, seed=0)


def _shape(task: str, described: dict[str, Any]) -> PreTrainedModel:
    """The model of a config.json's content."""
    known = {key: value for key, value in described.items() if key != "model_type"}
    return AUTO[task].from_config(AutoConfig.for_model(described["model_type"], **known))


def _read(path: Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a model's config: {error}") from error
    if "model_type" not in described:
        raise ValueError(f"{path} names no model_type: give a model's config.json")
    return described


def _teacher(config: Config, site: Site) -> tuple[PreTrainedModel | None, Schedule | None, dict[int, int]]:
    """(the teacher without weights, its schedule, bytes of each checkpoint that teaches)."""
    if not config.teacher.trajectory or config.teacher.targets:
        return None, None, {}
    folder = config.teacher.trajectory
    is_there = "://" in folder or (Path(folder) / NAME).exists()
    manifest = load_manifest(folder) if is_there else None
    if not (site.teacher_config or manifest):
        raise ValueError(
            f"{folder} holds no trajectory yet: give the teacher's config.json as --teacher-config"
        )
    steps = list(manifest.checkpoints) if manifest else config.schedule.checkpoints
    if not steps:
        raise ValueError(
            f"{folder} holds no trajectory yet: name the teacher's steps in schedule.checkpoints"
        )
    losses = manifest.losses if manifest else {}
    schedule = make_schedule(config.schedule, steps, losses, config.steps, config.batch_size)
    described = _read(site.teacher_config) if site.teacher_config else _config_of(manifest)
    teacher = _shape(config.data.task, described)
    teaching = {stage.checkpoint for stage in schedule.stages} | set(schedule.waiting)
    size = config.teacher.ensemble
    needed = sorted(teaching if size == 1 else {s for step in teaching for s in together(step, steps, size)})
    return teacher, schedule, {step: _bytes_of(manifest, step, teacher) for step in needed}


def _target_bytes(
    config: Config, teacher: PreTrainedModel | None, rows: float, vocab_size: int
) -> dict[str, float]:
    if teacher is None or config.teacher.tokenizer:
        return {}
    width, each = teacher.config.hidden_size, BYTES[config.teacher.dtype]
    codecs = [make_codec(name, 1.0) for name in ("sampled", "top_k", "hidden")]
    return {str(codec): rows * bytes_a_row(codec, vocab_size, width, each) for codec in codecs}


def _config_of(manifest: Manifest | None) -> dict[str, Any]:
    assert manifest is not None  # refused before
    described: dict[str, Any] = json.loads(manifest.files_of(max(manifest.checkpoints)).read("config.json"))
    return described


def _bytes_of(manifest: Manifest | None, step: int, teacher: PreTrainedModel) -> int:
    if manifest is None:  # public trajectories store 16 bits a number
        return 2 * num_parameters(teacher)
    return sum(size for size, _ in manifest.checkpoints[step].files.values())


def _micro_batch_size(config: Config, site: Site) -> int:
    share, remainder = divmod(config.batch_size, site.ranks)
    micro = config.micro_batch_size or share
    if remainder or not micro or share % micro:
        raise ValueError(
            f"batch_size {config.batch_size} must be {site.ranks} rank(s) x micro_batch_size {micro} x a whole number"
        )
    return micro


def _tokens_per_second(config: Config, site: Site, flops: float) -> tuple[float, str]:
    """As given, else from the operations a rank sustains, else as the run in run_dir has measured, else 0; and whence."""
    if site.tokens_per_second:
        return site.tokens_per_second, "as given"
    if site.tflops:
        return site.ranks * site.tflops * 1e12 / flops, f"{site.tflops:g} TFLOP/s a rank, as given"
    measured = Path(config.run_dir) / METRICS
    rows = read_rows(measured, "train") if measured.exists() else []
    if rows:
        speed = statistics.median(row["tokens_per_second"] for row in rows)
        return speed, f"as {config.run_dir} measured on the ranks that it had"
    return 0.0, ""
