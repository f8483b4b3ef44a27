"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch
from tiny import distill, settings, write_text_shards

# A slow machine is no failure, and a failure must come back: no deadlines, no chance.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny shards with something to learn; never written to."""
    return write_text_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def teacher_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished teacher run with trajectory steps 2, 4, 8, 16, 24; never written to."""
    folder = tmp_path_factory.mktemp("teacher")
    changes = {"steps": 24, "seed": 1, "save__trajectory_every": 8, "save__trajectory_first": 2}
    distill(["train", *settings(shards, folder / "run", **changes)], folder).ok()
    return folder / "run"
