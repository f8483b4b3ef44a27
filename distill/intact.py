"""Whether a checkpoint's files are still as they were written: a disk may cut them short, empty or change them.

Sizes are noted when a checkpoint is saved; its contents are read over once, before it is loaded. That costs the saving
nothing: `torch.save` puts a CRC-32 of each record into its file as it writes.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from distill.run_folder import STATE, step_of

FILES = "files"  # in a checkpoint's STATE: {path of a file: its bytes}
SEAL = "sha256"  # beside it: of all the rest


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in `folder`, by its path there."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def fault_of(checkpoint: Path, share: int = 0, shares: int = 1, contents: bool = True) -> str:
    """What is wrong with the files of a resumable checkpoint; empty if nothing is. Raises OSError if the disk won't say.

    contents: read them too, that is the share-th of `shares`: ranks divide the work.
    """
    try:
        sizes: dict[str, int] = unsealed(checkpoint).get(FILES, {})
    except (FileNotFoundError, ValueError) as error:
        return f"{STATE} can't be read ({error})"
    found = file_sizes(checkpoint)
    for name, size in sizes.items():
        if found.get(name) != size:
            return f"{name} has {found.get(name, 'no')} bytes, it was written with {size}"
    recorded = sorted(name for name in sizes if name.endswith(".pt"))
    for name in recorded[share::shares] if contents else ():
        if record := _changed_record(checkpoint / name):
            return f"{name} has changed since it was written, in its record {record}"
    return ""


def sealed(state: dict[str, Any]) -> str:
    """`state` as JSON with its own digest in it: a changed digit is as good JSON as the right one."""
    return json.dumps({**state, SEAL: _digest(state)})


def unsealed(checkpoint: Path) -> dict[str, Any]:
    """What was sealed. Raises OSError, and ValueError if it is not what was written, or that of another step."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("it holds no JSON object")
    if state.pop(SEAL, None) != _digest(state):
        raise ValueError("its content has changed since it was written")
    if state["step"] != step_of(checkpoint):
        raise ValueError(f"it is that of step {state['step']}")
    return state


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _changed_record(path: Path) -> str:
    """Name of a record that does not have its checksum, empty if all have; a file that `torch.save` wrote is a zip."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() or ""
    except (
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:  # by the place of the bit
        return str(error) or type(error).__name__
