"""What single methods ask of a config: a teacher's own tokenizer, speculation, its warm-up, pruning."""

from __future__ import annotations

import difflib
import itertools

from distill.config import ANY_TOKENIZER, OBJECTIVES, PRUNED, Config, ModelConfig, Ramp
from distill.schedule import ramp_at


def tokenizer_rules(c: Config) -> list[tuple[bool, str]]:
    if not c.teacher.tokenizer:
        return []
    name = "teacher.tokenizer is set"
    unserved = [n for n in c.objective.weights if n in OBJECTIVES and n not in (*ANY_TOKENIZER, "hard")]
    return [
        (
            bool(c.teacher.trajectory) and not c.teacher.targets and c.teacher.ensemble == 1,
            f"{name}: that needs one live teacher: set teacher.trajectory, leave out teacher.targets and teacher.ensemble",
        ),
        (
            c.data.task == "clm",
            f"{name}: only what has been read so far can be compared across tokenizers: it needs data.task=clm",
        ),
        (
            c.objective.speculate_from >= 1,
            f"{name}: the student's words mean nothing to the teacher: leave out objective.speculate_from",
        ),
        (
            not unserved,
            f"{name}: objective.weights names {' and '.join(unserved)}, which needs a common vocabulary: choose among "
            f"{', '.join(ANY_TOKENIZER)} and hard, or a student with the teacher's tokenizer",
        ),
    ]


def speculation_rules(c: Config) -> list[tuple[bool, str]]:
    first = c.objective.speculate_from
    if first >= 1:
        return []
    hard = c.objective.weights.get("hard", 0.0)
    later = [p[0] for p in hard if len(p) == 2 and p[0] > first] if isinstance(hard, list) else []
    taught = not any(ramp_at(hard, share) for share in (first, *later, 1.0)) if hard != [] else True
    name = f"objective.speculate_from={first}"
    return [
        *_continuation_rules(c, name),
        (
            taught,
            f"{name}: from there the labels are the student's own words, from which `hard` would learn nothing: let "
            "its weight be 0 from there, or leave it out",
        ),
    ]


def warm_up_rules(c: Config) -> list[tuple[bool, str]]:
    name, weights = "objective.weights.preference", c.objective.weights
    if "preference" not in weights:
        return []
    both = [weights["preference"], weights.get("hard", 0.0)]
    points = sorted({0.0, 1.0, *(p[0] for ramp in both if isinstance(ramp, list) for p in ramp if p)})
    shares = [*points, *((a + b) / 2 for a, b in itertools.pairwise(points))]
    whole = all(ramp != [] and not ramp_problems(ramp) for ramp in both)
    return [
        *_continuation_rules(c, name),
        (
            bool(c.model.init_from),
            f"{name} warms up a student that can write: set model.init_from to a trained one",
        ),
        (
            not whole or not any(all(ramp_at(ramp, share) > 0 for ramp in both) for share in shares),
            f"{name}: while it has weight the labels are the student's own words, from which `hard` would learn nothing: "
            "let one of both be 0, e.g. {preference: [[0, 1], [0.1, 1], [0.1, 0]], hard: [[0.1, 0], [0.1, 1]]}",
        ),
    ]


def _continuation_rules(c: Config, name: str) -> list[tuple[bool, str]]:
    return [
        (c.data.task == "clm", f"{name} lets the student go on with a text: it needs data.task=clm"),
        (
            bool(c.teacher.trajectory) and not c.teacher.targets and c.teacher.ensemble == 1,
            f"{name} needs one live teacher: set teacher.trajectory, leave out teacher.targets and teacher.ensemble",
        ),
        (
            not c.data.isolate_documents,
            f"{name} goes on across the ends of documents: set data.isolate_documents=false",
        ),
        (
            c.engine.zero_stage < 3 and c.teacher.zero_stage < 3,
            f"{name} runs both models many times a step, whose weights must be whole: set engine.zero_stage to 2 or "
            "less and teacher.zero_stage to 0",
        ),
    ]


def pruning_rules(c: Config) -> list[tuple[bool, str]]:
    to, until, warm = c.model.prune_to, c.model.prune_until, c.optim.warmup_share
    if not to:
        return [
            (
                until == ModelConfig().prune_until,
                f"model.prune_until={until} is read with model.prune_to only",
            )
        ]
    return [
        *[(name in PRUNED, f"model.prune_to.{name} is unknown{nearest_of(name, PRUNED)}") for name in to],
        *[
            (0 < left <= 1, f"model.prune_to.{name} must be above 0 and at most 1, got {left}")
            for name, left in to.items()
        ],
        (
            until > warm,
            f"model.prune_until={until} must be above optim.warmup_share={warm}, where pruning begins",
        ),
        (
            not c.save.trajectory_every,
            "model.prune_to makes checkpoints of different shapes, and a trajectory has one: set save.trajectory_every=0; "
            "`distill export` gives the newest checkpoint of a run that is under way",
        ),
        (
            not c.engine.compile,
            "model.prune_to was not tried with engine.compile=true: leave one of the two",
        ),
    ]


def ramp_problems(ramp: Ramp) -> list[str]:
    points = ramp if isinstance(ramp, list) else [[0.0, ramp]]
    if not points or any(len(p) != 2 for p in points):
        return [f"a ramp is a list of [share, value], got {ramp!r}"]
    shares = [p[0] for p in points]
    if shares != sorted(shares) or not 0 <= shares[0] <= shares[-1] <= 1:
        return [f"the shares of a ramp must rise within 0 to 1, got {shares}"]
    return [f"must not be negative, got {p[1]}" for p in points if p[1] < 0]


def nearest_of(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(names)}"
