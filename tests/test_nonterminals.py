"""The probe of hidden states for the grammar's symbols: what it finds, and `distill probe --nonterminals`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Ended, distill, settings
from torch import Tensor
from transformers import AutoModelForMaskedLM

from distill.__main__ import main
from distill.config import DataConfig
from distill.probes.nonterminals import (
    NonterminalStudy,
    Sentences,
    accuracies,
    ask_nonterminals,
    fit,
    majority,
    nonterminal_figures,
)

STUDY = NonterminalStudy(epochs=30, batch=32)
CPU = torch.device("cpu")


def made_sentences(number: int, seed: int, *, telling: bool) -> tuple[Tensor, Sentences]:
    """Hidden states [number, 12, 16] that tell the ancestors (levels 1 and 2) of their word, or are noise."""
    draw = torch.Generator().manual_seed(seed)
    ancestors = torch.randint(3, (number, 12, 2), generator=draw)
    hidden = torch.randn(number, 12, 16, generator=draw)
    if telling:
        hidden[..., :6] = 4.0 * torch.nn.functional.one_hot(ancestors, 3).flatten(2)
    is_word = torch.arange(12).expand(number, 12) < torch.randint(6, 13, (number, 1), generator=draw)
    tokens = np.zeros((number, 12), np.int64)
    return hidden, Sentences(tokens, is_word, ancestors, torch.where(is_word, 2, 0))


def test_what_hidden_states_tell_is_found_and_noise_is_not() -> None:
    for telling in (True, False):
        probe = fit(*made_sentences(256, 0, telling=telling), STUDY, CPU)
        hidden, held_out = made_sentences(128, 1, telling=telling)
        words = accuracies(probe, hidden, held_out, 32)["words"]
        assert len(words) == len(majority(held_out)) == 2
        if telling:
            assert min(words) > 0.9
        else:
            assert max(words) < max(majority(held_out)) + 5 * 0.5 / float(held_out.is_word.sum()) ** 0.5


def test_padding_is_neither_seen_nor_counted() -> None:
    hidden, plain = made_sentences(64, 0, telling=True)
    spoilt_hidden, ancestors = hidden.clone(), plain.ancestors.clone()
    spoilt_hidden[~plain.is_word], ancestors[~plain.is_word] = 99.0, 2
    spoilt = Sentences(plain.tokens, plain.is_word, ancestors, plain.heights)
    probe = fit(hidden, plain, STUDY, CPU)
    assert accuracies(probe, hidden, plain, 32) == accuracies(probe, spoilt_hidden, spoilt, 32)
    again = fit(spoilt_hidden, spoilt, STUDY, CPU)
    for one, other in zip(probe.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ the command

Ask = Callable[..., Ended]


@pytest.fixture(scope="module")
def trajectory(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a masked model of `sentences`, steps 2 and 4."""
    folder = tmp_path_factory.mktemp("grammarian")
    changes = {"steps": 4, "save__trajectory_every": 2, "log__eval_samples": 8}
    distill(["train", *settings(sentences, folder / "run", **changes)], folder).ok()
    return folder / "run" / "trajectory"


@pytest.fixture
def probe(
    trajectory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Ask:
    """`distill probe` of these shards with few other questions, in this process, into tmp_path / "out"."""

    def asked(shards: Path, *more: str, of: Path = trajectory) -> Ended:
        few = ("--ngrams", "2", "--sequences", "4", "--places", "1", "--out", str(tmp_path / "out"))
        words = ["distill", "probe", str(of), f"data.shards={shards}", "log.eval_samples=8"]
        monkeypatch.setattr(sys, "argv", [*words, *few, *more])
        code = main()
        return Ended(code, "".join(capsys.readouterr()))

    return asked


def test_the_command_asks_every_checkpoint_and_adds_what_an_earlier_run_did_not_ask(
    probe: Ask, sentences: Path, trajectory: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "probe.json"
    assert "level 1" not in probe(sentences, "--steps", "4").ok().output
    before = json.loads(path.read_text())
    before["checkpoints"][0]["loss"] = 123.0  # so that we see whether it is asked again
    path.write_text(json.dumps(before))
    shown = probe(sentences, "--nonterminals").ok().output
    assert "| 4 | 123.0000 |" in shown and "| step | level 1 | level 2 | level 3 |" in shown
    found = json.loads(path.read_text())
    assert [row["step"] for row in found["checkpoints"]] == [2, 4]
    model = AutoModelForMaskedLM.from_pretrained(trajectory / "step_00000004").eval()
    asked = ask_nonterminals(DataConfig(shards=str(sentences)), NonterminalStudy())
    assert found["checkpoints"][1]["nonterminals"] == nonterminal_figures(model, asked)
    assert found["majority"] == majority(asked.held_out)
    assert (tmp_path / "out" / "nonterminals.png").stat().st_size > 10_000
    assert probe(sentences, "--nonterminals").ok().output == shown  # nothing is left to do


def test_nonterminals_are_bound_to_the_weights_and_to_how_the_probe_is_trained(
    probe: Ask, sentences: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "probe.json"
    honest = probe(sentences, "--nonterminals", "--steps", "2").ok().output
    found = json.loads(path.read_text())
    found["checkpoints"][0]["nonterminals"]["ends"] = [9.0, 9.0, 9.0]
    path.write_text(json.dumps(found))
    assert "| 2 | 9.000 |" in probe(sentences, "--nonterminals", "--steps", "2").ok().output
    found["checkpoints"][0]["weights"] = ["of another run"]
    path.write_text(json.dumps(found))
    assert probe(sentences, "--nonterminals", "--steps", "2").ok().output == honest
    found["questions"]["nonterminals"]["epochs"] = 1
    path.write_text(json.dumps(found))
    ended = probe(sentences, "--nonterminals", "--steps", "2")
    assert ended.code == 2 and "answers another question: its nonterminals is" in ended.output


def test_text_without_parse_spans_is_told_where_they_come_from(
    probe: Ask, shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    ended = probe(shards, "--nonterminals", of=teacher_run / "trajectory")
    assert ended.code == 2 and not (tmp_path / "out").exists()
    assert "--nonterminals: " in ended.output and "shards of `python -m data_prep pcfg`" in ended.output
