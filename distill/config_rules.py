"""What a config must hold beyond the types of its fields: ranges, and settings that contradict each other."""

from __future__ import annotations

import math

from distill.config import (
    FUSED,
    OBJECTIVES,
    Config,
    ObjectiveConfig,
    Ramp,
    ScheduleConfig,
    TeacherConfig,
    fields_of,
)
from distill.method_rules import (
    nearest_of,
    pruning_rules,
    ramp_problems,
    speculation_rules,
    tokenizer_rules,
    warm_up_rules,
)
from distill.schedule import ramp_at

SHARES = (
    "data.mask_rate",
    "data.mask_token_share",
    "data.random_token_share",
    "objective.beta",
    "objective.speculate_from",
    "model.prune_until",
    "schedule.early_share",
    "schedule.min_gain",
    "optim.warmup_share",
    "optim.decay_share",
    "optim.final_lr_share",
)
POSITIVE = (
    "teacher.ensemble",
    "steps",
    "batch_size",
    "data.shuffle_window",
    "objective.speculate_top_k",
    "schedule.speed",
    "schedule.patience",
    "save.every",
    "save.keep",
    "log.every",
    "log.eval_every",
    "log.eval_samples",
    "optim.lr",
)
NOT_NEGATIVE = (
    "micro_batch_size",
    "objective.chunk_rows",
    "data.num_workers",
    "data.span_depth",
    "schedule.num_stages",
    "schedule.stage_steps",
    "optim.clip",
    "optim.eps",
    "optim.weight_decay",
    "teacher.cache_gb",
    "save.trajectory_every",
    "save.trajectory_first",
    "save.trajectory_drop_every",
)
COLDEST_SOFT = 1e-4  # below it the teacher is its arg-max
# A key of the schedule that the chosen kind doesn't read would be ignored in silence.
READ_BY = {
    "checkpoints": ("one_shot", "equal", "n_t", "two_shot", "speed", "saturation"),
    "num_stages": ("equal", "n_t", "saturation"),
    "stage_steps": ("n_t", "saturation"),
    "stages": ("explicit",),
    "speed": ("speed",),
    "patience": ("saturation",),
    "min_gain": ("saturation",),
}


# Terms on differences, ranks or the inside of the student: of themselves they leave its probabilities open.
OPEN = {
    "ckd", "ckd_hidden", "relations", "contrastive", "pearson", "spearman", "cmkd", "clkd", "cross_head", "hidden_cosine",
    "hidden_square", "attention_kl", "curriculum", "dpk", "kdiga", "preference",
}  # fmt: skip


def check(config: Config) -> list[str]:
    """Every value out of range and every contradiction in `config`, as lines for the user."""
    problems = [
        f"{key} must be one of {', '.join(f.metadata['choices'])}, got {value!r}"
        for key, f, value in fields_of(config)
        if f.metadata["choices"] and value not in f.metadata["choices"]
    ]
    for rule, message in _rules(config):
        if not rule:
            problems.append(message)
    for name, ramp in {**config.objective.weights, "temperature": config.objective.temperature}.items():
        problems += [f"objective {name}: {p}" for p in ramp_problems(ramp)]
    return problems or _idle_problems(config.objective)


def has_teacher(c: Config) -> bool:
    """Whether the run has one: a model or what it said."""
    return bool(c.teacher.trajectory or c.teacher.targets)


def _rules(c: Config) -> list[tuple[bool, str]]:
    at = {key: value for key, _, value in fields_of(c)}
    needs_teacher = any(name != "hard" for name in c.objective.weights)
    kind, stage = c.schedule.kind, c.schedule
    soft = [name for name in c.objective.weights if name in FUSED and name != "hard"]
    return [
        *[(0 <= at[k] <= 1, f"{k} must lie in 0 to 1, got {at[k]}") for k in SHARES],
        *[(at[k] > 0, f"{k} must be above 0, got {at[k]}") for k in POSITIVE],
        *[(at[k] >= 0, f"{k} must not be negative, got {at[k]}") for k in NOT_NEGATIVE],
        *[
            (0 <= at[k] < 1, f"{k} must be at least 0 and below 1, got {at[k]}")
            for k in ("optim.beta1", "optim.beta2")
        ],
        (abs(c.seed) < 2**63, f"seed must fit 64 bits, got {c.seed}"),
        (bool(c.run_dir), "run_dir is not set: give the run a folder, e.g. run_dir=runs/student"),
        (bool(c.data.shards), "data.shards is not set: make shards with `python -m data_prep shards`"),
        (
            c.data.mask_token_share + c.data.random_token_share <= 1,
            "data.mask_token_share + data.random_token_share must not pass 1, got "
            f"{c.data.mask_token_share} + {c.data.random_token_share}",
        ),
        (
            c.engine.zero_stage in range(4),
            f"engine.zero_stage must be 0, 1, 2 or 3, got {c.engine.zero_stage}",
        ),
        (c.teacher.zero_stage in (0, 3), f"teacher.zero_stage must be 0 or 3, got {c.teacher.zero_stage}"),
        (
            c.teacher.ensemble == 1 or c.teacher.unfinished == "refuse",
            f"teacher.ensemble={c.teacher.ensemble} needs a teacher whose run has ended: set teacher.unfinished=refuse, "
            f"got {c.teacher.unfinished}",
        ),
        (
            c.teacher.ensemble == 1 or not c.teacher.targets,
            f"teacher.ensemble={c.teacher.ensemble} is of a live teacher, targets are stored as one said them: "
            "leave out teacher.targets or the ensemble",
        ),
        (
            c.teacher.ensemble > 1 or c.teacher.pool == TeacherConfig().pool,
            f"teacher.pool={c.teacher.pool} is read with teacher.ensemble of 2 or more only",
        ),
        (
            c.data.task == "clm" or not c.data.span_depth,
            f"data.span_depth={c.data.span_depth} is read with data.task=clm only, got data.task={c.data.task}",
        ),
        (
            not (c.engine.zero_stage == 0 and c.engine.dtype == "bf16"),
            "engine.zero_stage=0 with bf16 takes a wrong first Adam step in DeepSpeed; use zero_stage=1, which costs the same",
        ),
        (
            not (c.engine.offload_optimizer and c.engine.zero_stage == 0),
            "engine.offload_optimizer=true is for engine.zero_stage 1 to 3, got 0: use 1, which computes the same",
        ),
        (
            not (c.engine.compile and c.engine.zero_stage == 3),
            "engine.compile=true is for engine.zero_stage 0 to 2, got 3, which gathers weights between any two layers: "
            "leave one of the two",
        ),
        (
            not c.teacher.offload or c.teacher.zero_stage == 3,
            "teacher.offload=true fetches layers by ZeRO 3: set teacher.zero_stage=3 (on one rank too), "
            f"got {c.teacher.zero_stage}",
        ),
        *[
            (name in OBJECTIVES, f"objective.weights.{name} is unknown{nearest_of(name, OBJECTIVES)}")
            for name in c.objective.weights
        ],
        (
            len(soft) <= 1,
            f"objective.weights names {' and '.join(soft)}: one divergence from the teacher at a time, keep one",
        ),
        *[
            (isinstance(given, dict), f"objective.settings.{name} must be {{key: value}}, got {given!r}")
            for name, given in c.objective.settings.items()
        ],
        (
            not (c.objective.weights.keys() & OPEN)
            or any(_highest(ramp) > 0 for name, ramp in c.objective.weights.items() if name not in OPEN),
            f"objective.weights gives weight to {' and '.join(c.objective.weights.keys() & OPEN)} alone, which leaves "
            "the student's probabilities open: add an anchor, e.g. forward_kl: 0.5 or hard: 0.1",
        ),
        (
            "kdiga" not in c.objective.weights
            or (c.engine.zero_stage < 3 and c.teacher.zero_stage < 3 and not c.engine.compile),
            "objective.weights.kdiga derives by the inputs, the student's twice, for which weights must be whole and code "
            "not compiled: set engine.zero_stage to 2 or less, teacher.zero_stage=0 and engine.compile=false",
        ),
        *tokenizer_rules(c),
        *speculation_rules(c),
        *pruning_rules(c),
        *warm_up_rules(c),
        (
            "jsd" in soft or c.objective.beta == ObjectiveConfig().beta,
            f"objective.beta={c.objective.beta} is read by jsd only, which objective.weights does not name",
        ),
        (
            not _is_infinite_when_cold(c.objective) or _lowest(c.objective.temperature) >= COLDEST_SOFT,
            f"objective.temperature falls to {_lowest(c.objective.temperature)}, where the teacher is its arg-max and "
            f"the reverse KL infinite: keep it at {COLDEST_SOFT} or above, or choose another divergence",
        ),
        (
            has_teacher(c) or not needs_teacher,
            "objective.weights names a teacher's objective but teacher.trajectory is not set, nor teacher.targets; "
            "set one, or train on labels with objective.weights={hard: 1}",
        ),
        (
            not has_teacher(c) or needs_teacher,
            f"teacher.{'trajectory' if c.teacher.trajectory else 'targets'} is set but objective.weights only has `hard`: "
            "the teacher would run for nothing",
        ),
        (
            not (c.teacher.targets and c.teacher.unfinished == "newest"),
            "teacher.unfinished=newest is for a trajectory; of targets every sample has its own: use wait or refuse",
        ),
        (
            not (c.teacher.targets and kind == "saturation"),
            "schedule.kind=saturation follows the student's progress, which nobody knew when teacher.targets were scored: "
            "choose another kind, or train with the trajectory itself",
        ),
        (
            kind != "explicit" or bool(stage.stages),
            "schedule.kind=explicit needs schedule.stages=[[step, teacher step], ...]",
        ),
        *[
            (
                kind in kinds or getattr(stage, key) == getattr(ScheduleConfig(), key),
                f"schedule.{key}={getattr(stage, key)} is read by kind {' and '.join(kinds)} only, "
                f"got schedule.kind={kind}",
            )
            for key, kinds in READ_BY.items()
        ],
        (
            not (c.model.init_from and c.model.overrides),
            "model.overrides shape a new model, model.init_from brings its own config: "
            f"set model.overrides={{}}, got {c.model.overrides}",
        ),
        (
            bool(c.model.init_from) or not c.model.init_layers,
            f"model.init_layers={c.model.init_layers} are layers of model.init_from, which is not set",
        ),
        (
            c.optim.decay != "wsd" or c.optim.warmup_share + c.optim.decay_share <= 1,
            "optim.warmup_share + optim.decay_share must not pass 1 with decay=wsd, got "
            f"{c.optim.warmup_share} + {c.optim.decay_share}",
        ),
        (kind != "n_t" or stage.stage_steps > 0, "schedule.kind=n_t needs schedule.stage_steps above 0"),
        (
            kind == "two_shot" or len(stage.checkpoints) != 1 or kind == "one_shot",
            "schedule.checkpoints has one entry: use kind=one_shot",
        ),
        (
            all(len(pair) == 2 for pair in stage.stages),
            f"schedule.stages must be pairs [student step, teacher step], got {stage.stages}",
        ),
        *[
            (
                not at[key] or c.save.trajectory_every > 0,
                f"{key} needs save.trajectory_every, the steps between the later checkpoints",
            )
            for key in ("save.trajectory_first", "save.trajectory_drop_every", "save.trajectory_to")
        ],
    ]


def _is_infinite_when_cold(objective: ObjectiveConfig) -> bool:
    return "reverse_kl" in objective.weights or ("jsd" in objective.weights and objective.beta == 1)


def _lowest(ramp: Ramp) -> float:
    return min((p[-1] for p in ramp if p), default=math.inf) if isinstance(ramp, list) else ramp


def _highest(ramp: Ramp) -> float:
    return max((p[-1] for p in ramp if p), default=0.0) if isinstance(ramp, list) else ramp


def _idle_problems(objective: ObjectiveConfig) -> list[str]:
    """A part of the budget in which all weights are 0. Between the points of the ramps their sum is linear."""
    ramps = objective.weights.values()
    shares = sorted({0.0, 1.0, *(p[0] for ramp in ramps if isinstance(ramp, list) for p in ramp)})
    sums = [sum(ramp_at(ramp, share) for ramp in ramps) for share in shares]
    return [
        f"objective.weights are all 0 from {a:g} to {b:g} of the budget, where nothing would be learnt: "
        "raise one of them"
        for a, b, at_a, at_b in zip(shares, shares[1:], sums, sums[1:], strict=False)
        if at_a == at_b == 0
    ]
