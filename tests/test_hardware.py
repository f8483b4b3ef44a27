"""A CPU without bf16 matrix products: told at the start of a run, and passed by in a study."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from distill import hardware
from distill.build import warn_of_emulation
from distill.config import Config, to_yaml
from distill.distributed import World
from distill.experiments.arms import dtype_for_this_cpu

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_every_cpu_multiplies_float32() -> None:
    assert hardware.cpu_multiplies(torch.float32)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_run_in_bf16_is_warned_where_its_products_are_emulated(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda dtype: has_bf16 or dtype == torch.float32)
    config = Config()
    with caplog.at_level(logging.WARNING):
        warn_of_emulation(config, ALONE)
        assert ("engine.dtype=fp32" in caplog.text) == (not has_bf16)
        assert "teacher.dtype" not in caplog.text  # there is none
        caplog.clear()
        config.engine.dtype, config.teacher.trajectory = "fp32", "t"
        warn_of_emulation(config, ALONE)
        assert ("teacher.dtype=fp32" in caplog.text) == (not has_bf16)
        assert "engine.dtype" not in caplog.text
        caplog.clear()
        warn_of_emulation(config, World(1, 2, 1, torch.device("cpu")))  # told once, by rank 0
        warn_of_emulation(config, World(0, 1, 0, torch.device("cuda")))
    assert not caplog.text


def test_a_study_trains_in_fp32_where_bf16_is_emulated_unless_it_has_begun_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda dtype: False)
    assert dtype_for_this_cpu(tmp_path) == ["engine.dtype=fp32", "teacher.dtype=fp32"]
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    assert dtype_for_this_cpu(tmp_path) == ["engine.dtype=bf16", "teacher.dtype=bf16"]
    (tmp_path / "config.yaml").unlink()
    monkeypatch.setattr(hardware, "cpu_multiplies", lambda dtype: True)
    assert dtype_for_this_cpu(tmp_path) == []
