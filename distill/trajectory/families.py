"""How training runs name their checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

# family -> pattern of a folder name; the group is the training step
FAMILIES = {
    "distill": r"step_(\d+)",
    "pythia": r"step(\d+)",
    "olmo": r"(?:stage\d+-)?step(\d+)-tokens\d+B",
    "llm360": r"ckpt_(\d+)",
    "transformers": r"checkpoint-(\d+)",
    "deepspeed": r"global_step(\d+)",
    "dashed": r"step-(\d+)",
}


def find_checkpoints(folder: Path) -> tuple[str, dict[int, Path]]:
    """(family, {step: folder}) of the checkpoint folders right under `folder`.

    Raises:
        ValueError: none is found, folders of several families, or two folders of one step.
    """
    found: dict[str, dict[int, Path]] = {}
    for child in sorted(p for p in folder.iterdir() if p.is_dir()):
        for family, pattern in FAMILIES.items():
            if match := re.fullmatch(pattern, child.name):
                steps = found.setdefault(family, {})
                step = int(match[1])
                if step in steps:
                    raise ValueError(f"{folder}: both {steps[step].name} and {child.name} are step {step}")
                steps[step] = child
    if len(found) != 1:
        known = ", ".join(FAMILIES.values())
        raise ValueError(
            f"{folder}: expected checkpoint folders of one family ({known}), got {sorted(found) or 'none'}"
        )
    return found.popitem()
