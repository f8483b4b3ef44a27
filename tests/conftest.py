"""What all tests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from storage import BUCKET, Seaweed
from tiny import distill, ragged_text, settings, write_text_shards

from data_prep.__main__ import main as data_prep

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
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of sequences that count unequally; never written to."""
    return write_text_shards(tmp_path_factory.mktemp("ragged") / "shards", make=ragged_text)


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of cfg3b from its third level, with parse spans; never written to."""
    out = tmp_path_factory.mktemp("pcfg") / "shards"
    sizes = ["--levels", "3", "--train", "600", "--validation", "200"]
    assert data_prep(["pcfg", "cfg3b", *sizes, "--out", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="session")
def teacher_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished teacher run with trajectory steps 2, 4, 8, 16, 24; never written to."""
    folder = tmp_path_factory.mktemp("teacher")
    changes = {"steps": 24, "seed": 1, "save__trajectory_every": 8, "save__trajectory_first": 2}
    distill(["train", *settings(shards, folder / "run", **changes)], folder).ok()
    return folder / "run"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """The S3 server of all tests; one that kills it takes `own_seaweed`."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.close()


@pytest.fixture
def own_seaweed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seaweed]:
    """An S3 server that may be killed; this process and its children are its clients."""
    server = Seaweed(tmp_path / "seaweed")
    server.start()
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def bucket(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty place on the S3 server; this process and its children have the credentials."""
    for name, value in seaweed.environ.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
