"""Folders and texts that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from data_prep.files import whole_file


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def writing(folder: Path, removes: bool = True) -> Iterator[None]:
    """Around a library that writes into `folder`: what is half-written goes, and the fault is one OSError.

    removes: False on the ranks that would take the folder from under one that still writes there.
    torch and safetensors raise errors of their own kinds when a disk is full, not all of which say so.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if removes:
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e6
        raise OSError(
            f"{folder} can't be written: {error}; {free:,.1f} MB are free there. "
            "What was saved before is unharmed, the same command goes on"
        ) from error


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush everything in `temporary` to disk, then give it its final name."""
    for path in [*(p for p in temporary.rglob("*") if p.is_file()), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(temporary, final)
