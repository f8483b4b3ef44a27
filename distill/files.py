"""Folders and texts that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.files import whole_file


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one."""
    with whole_file(path) as file:
        file.write(text.encode())


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush everything in `temporary` to disk, then give it its final name."""
    for path in [*(p for p in temporary.rglob("*") if p.is_file()), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(temporary, final)
