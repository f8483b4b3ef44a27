"""A plan as the user reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from distill.memory import RankMemory
from distill.objectives import term_names
from distill.plan import Plan

GIB, GB = 2**30, 1e9
ESTIMATES = ("activations", "logits")


def plan_text(plan: Plan) -> str:
    """Several lines: models and budget, memory of a rank by ZeRO stage, schedule, storage, disk, time."""
    parts = (_budget(plan), _memory(plan), _teaching(plan), _disk(plan), _time(plan))
    return "\n\n".join(filter(None, ("\n".join(lines) for lines in parts)))


def _budget(plan: Plan) -> Iterator[str]:
    config, site = plan.config, plan.site
    yield f"student   {plan.student_parameters / 1e6:,.1f} M parameters, {config.engine.dtype}"
    if plan.learned_parameters:
        yield f"learned   {plan.learned_parameters / 1e6:,.1f} M parameters of the objective, beside the student"
    if plan.teacher_parameters:
        dealt = "dealt over the ranks" + (", in host memory" if config.teacher.offload else "")
        where = dealt if config.teacher.zero_stage == 3 else "whole on every rank"
        yield f"teacher   {plan.teacher_parameters / 1e6:,.1f} M parameters, {config.teacher.dtype}, {where}"
    yield (
        f"budget    {config.steps:,} steps x {config.batch_size:,} sequences x {plan.sequence_length:,} tokens "
        f"= {plan.tokens / 1e9:,.2f} G tokens"
    )
    accumulation = config.batch_size // site.ranks // plan.micro_batch_size
    yield (
        f"layout    {site.ranks} rank(s) on {site.nodes} node(s), {accumulation} micro-batch(es) of "
        f"{plan.micro_batch_size} sequences a rank and step"
    )


def _memory(plan: Plan) -> Iterator[str]:
    stages = list(plan.memory)
    yield f"{'memory of a rank, GiB':<24}" + "".join(f"{f'ZeRO {s}':>10}" for s in stages)
    for field in dataclasses.fields(RankMemory):
        values = [getattr(plan.memory[s], field.name) for s in stages]
        if any(values):
            name = field.name + (" (estimate)" if field.name in ESTIMATES else "")
            yield f"  {name:<22}" + "".join(f"{value / GIB:>10.2f}" for value in values)
    yield f"  {'total':<22}" + "".join(f"{plan.memory[s].total / GIB:>10.2f}" for s in stages)
    verdicts = ["fits" if plan.fits(s) else "too much" for s in stages]
    yield f"  {f'of {plan.site.memory_gib:g} GiB':<22}" + "".join(f"{v:>10}" for v in verdicts)
    host = {
        "of optimizer (not in ZeRO 0)": plan.host_optimizer_bytes,
        "of the next teacher": plan.host_teacher_bytes,
    }
    if any(host.values()):
        yield "host memory of a rank: " + ", ".join(f"{n / GIB:,.2f} GiB {of}" for of, n in host.items() if n)
    yield f"this run: ZeRO {plan.config.engine.zero_stage}; ZeRO 0 is fp32 whatever engine.dtype says"


def _teaching(plan: Plan) -> Iterator[str]:
    if plan.schedule is None:
        return
    yield plan.schedule.table()
    number, one, total = len(plan.checkpoint_bytes), sum(plan.checkpoint_bytes.values()), plan.storage_bytes
    how = "each byte once, then from node to node"
    if plan.in_place and plan.site.nodes > 1:
        how = "every node reads all where it lies; teacher.cache=FOLDER on the node's own disk reads each byte once"
    yield (
        f"storage   {number} checkpoint(s) of {one / number / GB:,.2f} GB: {total / GB:,.1f} GB read in all, "
        f"{total / plan.site.nodes / GB:,.1f} GB by each node ({how})"
    )


def _disk(plan: Plan) -> Iterator[str]:
    config = plan.config
    to_make = f"{plan.most_shard_bytes / GB:,.1f} GB, less if samples are read more than once"
    yield "shards    " + (f"{plan.shard_bytes / GB:,.1f} GB" if plan.shard_bytes else to_make)
    yield f"saved     {plan.saved_bytes / GB:,.1f} GB: {config.save.keep} resumable checkpoints and the one being written"
    if plan.trajectory_bytes:
        yield f"leaves    {plan.trajectory_bytes / GB:,.1f} GB of trajectory"
    if plan.target_bytes:
        yield (
            f"targets   {_targets(plan)}, if stored by `distill score` (an estimate, before compression; of 50 draws 12 taken to "
            "be of different tokens: of a flat teacher three times as much)"
        )


def _targets(plan: Plan) -> str:
    return ", ".join(f"{size / GB:,.1f} GB {codec}" for codec, size in plan.target_bytes.items())


def _time(plan: Plan) -> Iterator[str]:
    flops = plan.student_flops + plan.teacher_flops
    yield (
        f"work      {flops / 1e9:,.2f} GFLOP a token, {plan.teacher_flops / flops:.0%} of it the teacher's; "
        f"{flops * plan.tokens / 1e18:,.1f} EFLOP in all"
    )
    if terms := term_names(plan.config.objective):
        yield (
            f"terms     {', '.join(terms)}: products of the last layers, further runs of trunks, plain attention and learned "
            "weights are counted; hidden states that wait for the backward pass and work among rows are not"
        )
    if "preference" in terms or plan.config.objective.speculate_from < 1:
        yield (
            "          not counted: continuations by the student and what checks them, for preference the model of the start and "
            "twice the micro-batch"
        )
    if not plan.seconds:
        yield "time      unknown: give --tokens-per-second, or --tflops that a rank sustains"
        return
    hours = plan.seconds / 3600
    steps = plan.config.steps / plan.seconds
    yield (
        f"time      {hours:,.1f} h at {plan.tokens_per_second:,.0f} tokens/s ({plan.speed_source}; {steps:,.2f} steps/s): "
        f"{hours * plan.site.ranks:,.0f} rank-hours"
    )
    saved, apart = plan.saved_bytes / (plan.config.save.keep + 1), plan.config.save.every / steps
    yield (
        f"saving    {saved / GB:,.1f} GB every {apart:,.0f} s, while the steps wait: a twentieth of the time "
        f"at {saved / 1e6 / (0.05 * apart):,.0f} MB/s"
    )
    if plan.fetches:
        yield from _stall(plan)


def _stall(plan: Plan) -> Iterator[str]:
    given, enough = plan.site.storage_mb_per_second, plan.enough_mb_per_second
    wait = (
        f"{plan.stall_seconds:,.0f} s of waiting for the next teacher"
        if given
        else "give --storage-mb-per-second"
    )
    yield f"stall     {wait}; none where storage gives {enough:,.1f} MB/s to all nodes together"
