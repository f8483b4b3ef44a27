"""What leaves a run is plain Hugging Face: it opens without us and says what the trained engine says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, Kill, distill, settings
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import distill.train as loop
from distill.config_reader import load_config
from distill.train import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of DeepSpeed and torch, about each other
CASES = [("mlm", "bert"), ("mlm", "modernbert"), ("clm", "gpt2"), ("clm", "gpt_neox"), ("clm", "llama")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("task", "architecture"), CASES)
def test_exported_model_says_what_the_engine_says(
    task: str, architecture: str, dtype: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = torch.arange(5, 29).unsqueeze(0)
    said = []
    plain = loop.finish

    def watched(run, state, found):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            said.append(run.engine.model.eval()(input_ids=probe).logits)
        return plain(run, state, found)

    monkeypatch.setattr(loop, "finish", watched)
    changes = {"data__task": task, "model__architecture": architecture, "engine__dtype": dtype, "steps": 3}
    train(load_config([], settings(shards, tmp_path / "run", **changes)))
    auto = AutoModelForMaskedLM if task == "mlm" else AutoModelForCausalLM
    folder = tmp_path / "run" / "model"
    model, report = auto.from_pretrained(
        folder, dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with torch.no_grad():
        logits = model.eval()(input_ids=probe).logits
    tolerance = 1e-5 if dtype == "fp32" else 0.05  # eager attention in bf16 rounds elsewhere
    torch.testing.assert_close(logits, said[0], rtol=tolerance, atol=tolerance)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("w5 w77 <mask> </s>")["input_ids"] == [5, 77, 4, 3]
    assert len(tokenizer) == VOCABULARY
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_generation_config_and_special_ids_travel(shards: Path, tmp_path: Path) -> None:
    changes = {"data__task": "clm", "model__architecture": "llama", "steps": 2}
    run(["train", *settings(shards, tmp_path / "run", **changes)], tmp_path)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 3, 0)


def run(arguments: list[str], folder: Path, kill: Kill | None = None) -> None:
    """`distill` to its end, or to its kill."""
    ended = distill(arguments, folder, kill)
    assert ended.code == (0 if kill is None else -kill.number), ended.output


@pytest.mark.parametrize(
    ("zero_stage", "dtype"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_export_of_a_run_that_is_under_way_is_its_newest_checkpoint(
    zero_stage: int, dtype: str, shards: Path, tmp_path: Path
) -> None:
    changes = {"engine__zero_stage": zero_stage, "engine__dtype": dtype, "save__trajectory_every": 5}
    arguments = ["train", *settings(shards, tmp_path / "run", **changes)]
    run(arguments, tmp_path, Kill("distill.engine:Engine.step", 12))
    run(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")], tmp_path)
    at_10 = (tmp_path / "run" / "trajectory" / "step_00000010" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == at_10
    AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_export_of_a_finished_run_is_its_model(teacher_run: Path, tmp_path: Path) -> None:
    run(["export", str(teacher_run), "--out", str(tmp_path / "out")], tmp_path)
    for path in (teacher_run / "model").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_export_that_can_not_be_is_refused(teacher_run: Path, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    run(["train", *settings(shards, tmp_path / "young")], tmp_path, Kill("distill.engine:Engine.step", 2))
    for arguments, said in (
        (
            [str(tmp_path / "nothing"), "--out", str(tmp_path / "x")],
            "is no run folder: it has no config.yaml",
        ),
        ([str(teacher_run), "--out", str(tmp_path / "taken")], "exists already: choose another --out"),
        ([str(tmp_path / "young"), "--out", str(tmp_path / "x")], "has no whole checkpoint yet"),
    ):
        ended = distill(["export", *arguments], tmp_path)
        assert ended.code == 2, ended.output
        assert said in ended.output
        assert not (tmp_path / "x").exists()


def test_eval_of_an_exported_folder_finds_the_runs_own_validation(
    teacher_run: Path, shards: Path, tmp_path: Path
) -> None:
    arguments = [f"data.shards={shards}", "engine.dtype=fp32", "log.eval_samples=16", "batch_size=8"]
    ended = distill(["eval", str(teacher_run / "model"), *arguments], tmp_path).ok()
    found = json.loads(ended.output.splitlines()[-1])
    own = json.loads((teacher_run / "result.json").read_text())
    assert found["hard"] == pytest.approx(own["hard"], rel=1e-6)
    assert found["accuracy"] == own["accuracy"]
