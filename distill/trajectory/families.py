"""How training runs name their checkpoints: as folders, as revisions of a hub repository, or as repositories."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A naming scheme.

    pattern: of the whole name, with a group `step` and perhaps `stage` and `tokens` (such as 84B or 2BT).
    steps_of: steps that the group counts, e.g. 1000 for `20k`.
    """

    name: str
    pattern: str
    steps_of: int = 1


@dataclass(frozen=True)
class Named:
    """A checkpoint's name, read: its step, the stage it belongs to (empty without), tokens seen if the name tells."""

    name: str
    step: int
    stage: str
    tokens: int | None


# The first that fits all names is taken. Names as published on the hub by 2026-11.
FAMILIES = (
    Family("distill", r"step_(?P<step>\d+)"),
    Family("pythia", r"step(?P<step>\d+)"),
    Family(
        "olmo", r"(?:(?P<stage>stage\d+(?:-ingredient\d+)?)-)?step(?P<step>\d+)-tokens(?P<tokens>\d+[MBT])"
    ),
    Family("llm360", r"ckpt_(?P<step>\d+)"),
    Family("fineweb", r"step-(?P<step>\d+)-(?P<tokens>\d+BT)"),
    Family("smollm3", r"(?P<stage>stage\d+|lc-\w+-to-\w+)-step-(?P<step>\d+)"),
    Family("smollm2", r"step-(?P<step>\d+)"),
    Family("multiberts", r"multiberts-(?P<stage>seed_\d+)-step_(?P<step>\d+)k", steps_of=1000),
    Family("transformers", r"checkpoint-(?P<step>\d+)"),
    Family("deepspeed", r"global_step(?P<step>\d+)"),
)
# Part of a source's name -> tokens in a step, where a paper or model card tells: Pythia (arXiv 2304.01373, table 6),
# SmolLM3-3B-checkpoints (model card).
TOKENS_A_STEP = {"pythia": 2_097_152, "smollm3": 2_359_296}
UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}


def read_names(
    names: Iterable[str], source: str, pattern: str | None = None, stage: str | None = None
) -> tuple[str, dict[int, Named]]:
    """(family, {step: name}) of the names that are checkpoints; others are left out.

    pattern: of a scheme that is not known here, with a group `step`. stage: pattern of those to take, where there are
    several; steps that go on counting through the stages may be taken together.

    Raises:
        ValueError: no checkpoint, names of several families, two of one step, or several stages and none chosen.
    """
    families = (_custom(pattern),) if pattern else FAMILIES
    found = {family.name: _those_of(family, names := list(names), source) for family in families}
    found = {name: read for name, read in found.items() if read}
    if len(found) != 1:
        known = ", ".join(f.name for f in FAMILIES)
        raise ValueError(
            f"{source}: expected checkpoints named by one family ({known}), got {sorted(found) or 'none'}; "
            "other names need --pattern, a regular expression with a group (?P<step>...)"
        )
    name, read = found.popitem()
    steps: dict[int, Named] = {}
    for each in _one_stage(read, source, stage):
        if each.step in steps:
            raise ValueError(f"{source}: both {steps[each.step].name} and {each.name} are step {each.step}")
        steps[each.step] = each
    return name, dict(sorted(steps.items()))


def _custom(pattern: str) -> Family:
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"--pattern {pattern!r} is no regular expression: {error}") from None
    if "step" not in groups:
        raise ValueError(
            f"--pattern {pattern!r} needs a group (?P<step>...), it has {list(groups) or 'none'}"
        )
    return Family("custom", pattern)


def _those_of(family: Family, names: list[str], source: str) -> list[Named]:
    a_step = next((tokens for part, tokens in TOKENS_A_STEP.items() if part in source.lower()), None)
    found = []
    for name in sorted(names):
        if match := re.fullmatch(family.pattern, name):
            groups = match.groupdict()
            step = int(groups["step"]) * family.steps_of
            tokens = _count(groups["tokens"]) if groups.get("tokens") else a_step and a_step * step
            found.append(Named(name, step, groups.get("stage") or "", tokens))
    return found


def _count(text: str) -> int:
    """84B -> 84 * 10^9; a BT is a billion tokens."""
    digits, unit = re.fullmatch(r"(\d+)([MBT])T?", text).groups()  # type: ignore[union-attr]  # by the pattern
    return int(digits) * UNITS[unit]


def _one_stage(read: list[Named], source: str, stage: str | None) -> list[Named]:
    stages = sorted({each.stage for each in read})
    if stage is None and len(stages) > 1:
        raise ValueError(f"{source} has several stages {stages}: choose with --stage (a name or a pattern)")
    taken = [each for each in read if re.fullmatch(stage or ".*", each.stage)]
    if not taken:
        raise ValueError(f"{source} has no stage {stage!r}; it has {stages}")
    return taken
