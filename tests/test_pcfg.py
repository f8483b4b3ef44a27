"""Sentences of the five grammars: right by their own parser, reproducible, shards with parse spans beside them."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import ROOT, contents
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.encoding import load_tokenizer
from data_prep.grammars import NAMES, Grammar, level_of, load_grammar
from data_prep.sentences import Sampler, Sentences
from data_prep.shards import ShardReader
from data_prep.spans import SpanReader, ancestors_of, heights_of


def split_words(sentences: Sentences) -> list[list[int]]:
    return [words.tolist() for words in np.split(sentences.words, np.cumsum(sentences.lengths)[:-1])]


@pytest.mark.parametrize(
    ("name", "num_rules", "mean"),
    [("cfg3b", 31, 294), ("cfg3f", 54, 250), ("cfg3g", 48, 254), ("cfg3h", 39, 237), ("cfg3i", 32, 309)],
)
def test_the_grammars_have_the_papers_rules_and_lengths(name: str, num_rules: int, mean: int) -> None:
    grammar = load_grammar(name)
    assert sum(map(len, grammar.rules.values())) == num_rules
    assert all(
        level_of(part) == level_of(symbol) - 1
        for symbol, productions in grammar.rules.items()
        for rule in productions
        for part in rule
    )
    chances = grammar.length_chances
    assert chances.sum() == pytest.approx(1)
    assert chances @ np.arange(len(chances)) == pytest.approx(mean, abs=2)  # theirs: of 4000 random sentences


@pytest.mark.parametrize("levels", [1, 3, 6])
@pytest.mark.parametrize("name", NAMES)
def test_every_sentence_parses_back_and_a_spoilt_one_does_not(name: str, levels: int) -> None:
    grammar = load_grammar(name, levels)
    for words in split_words(Sampler(grammar, 5).draw(20)):
        assert grammar.derives(words)
        assert not grammar.derives([*words, *[3] * grammar.longest])
        assert not grammar.derives([])


def test_a_change_of_one_word_is_seen() -> None:
    grammar = load_grammar("cfg3b")
    (words,) = split_words(Sampler(grammar, 1).draw(1))
    spoilt = [words[:i] + [words[i] % 3 + 1] + words[i + 1 :] for i in range(0, len(words), 40)]
    assert not all(grammar.derives(other) for other in spoilt)


def test_lengths_follow_the_exact_distribution_and_rules_are_equally_likely() -> None:
    grammar = load_grammar("cfg3f", 2)
    sentences = Sampler(grammar, 3).draw(60_000)
    seen = np.bincount(sentences.lengths, minlength=grammar.longest + 1) / 60_000
    expected = grammar.length_chances
    assert np.abs(seen - expected).max() < 5 * np.sqrt(0.25 / 60_000)
    first = collections.Counter(map(tuple, split_words(Sampler(load_grammar("cfg3f", 1), 3).draw(33_000))))
    for symbol, productions in load_grammar("cfg3f", 1).rules.items():
        for rule in productions:
            others = sum(rule in p for s, p in load_grammar("cfg3f", 1).rules.items() if s != symbol)
            if not others:
                assert first[rule] == pytest.approx(33_000 / 3 / len(productions), rel=0.1)


def tree_of(words: list[int], codes: np.ndarray, levels: int) -> list[list[int]]:
    """Symbols of every level, from the words up, as the span codes tell: a span ends where the height reaches it."""
    heights, above = heights_of(codes), ancestors_of(codes, levels)
    return [words] + [
        [7 + 3 * level + int(above[i, level]) for i in range(len(words)) if heights[i] > level]
        for level in range(levels)
    ]


def rules_used(rows: list[list[int]], codes: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    """(symbol, its production) of the whole tree."""
    used, heights = [], heights_of(codes).tolist()
    for level, (below, symbols) in enumerate(zip(rows, rows[1:], strict=False)):
        ends = [h > level for h in heights if level == 0 or h >= level]
        parts: list[int] = []
        own = iter(symbols)
        for part, end in zip(below, ends, strict=True):
            parts.append(part)
            if end:
                used.append((next(own), tuple(parts)))
                parts = []
        assert not parts
    return used


@pytest.mark.parametrize("name", NAMES)
def test_the_spans_are_a_derivation_of_the_sentence(name: str) -> None:
    grammar = load_grammar(name)
    sentences = Sampler(grammar, 8).draw(5)
    codes_of = np.split(sentences.spans, np.cumsum(sentences.lengths)[:-1])
    for words, codes in zip(split_words(sentences), codes_of, strict=True):
        rows = tree_of(words, codes, grammar.levels)
        assert rows[-1] == [22]
        assert all(parts in grammar.rules[symbol] for symbol, parts in rules_used(rows, codes))


def make(out: Path, *more: str) -> int:
    command = ["pcfg", "cfg3b", "--levels", "3", "--train", "5000", "--validation", "300", "--out", str(out)]
    return main([*command, "--shard-megabytes", "1", *more])


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: value for name, value in contents(folder).items() if name.endswith((".tar", ".npy"))}


def test_any_number_of_workers_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    assert make(tmp_path / "a", "--workers", "1") == make(tmp_path / "b", "--workers", "3") == 0
    assert len(shards_of(tmp_path / "a")) == 14
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert make(tmp_path / "c", "--workers", "1", "--seed", "1") == 0
    assert not set(shards_of(tmp_path / "a").values()) & set(shards_of(tmp_path / "c").values())


def test_shards_hold_a_sentence_a_sample_with_its_spans_and_pass_verification(tmp_path: Path) -> None:
    assert make(tmp_path / "s", "--workers", "1") == 0
    assert main(["verify", str(tmp_path / "s"), "--workers", "1"]) == 0
    grammar, reader = load_grammar("cfg3b", 3), ShardReader(tmp_path / "s", "train")
    spans, info = SpanReader(tmp_path / "s", "train"), reader.index.tokenizer
    for sample in (0, 1, 975, 976, 4999):  # both sides of a shard's border
        tokens, codes = reader[sample], spans[sample]
        length = int((tokens > info.mask_id).sum())
        assert tokens[0] == info.bos_id and tokens[length + 1] == info.eos_id
        assert (tokens[length + 2 :] == info.pad_id).all()
        assert (codes[[0, *range(length + 1, len(codes))]] == 0).all()
        words = (tokens[1 : length + 1] - 4).tolist()
        assert grammar.derives(words)
        rows = tree_of(words, codes[1 : length + 1], 3)
        assert len(rows[-1]) == 1
        assert all(parts in grammar.rules[s] for s, parts in rules_used(rows, codes[1 : length + 1]))


def test_the_words_have_a_tokenizer_that_transformers_opens(tmp_path: Path) -> None:
    assert make(tmp_path / "s", "--workers", "1") == 0
    ours = load_tokenizer(tmp_path / "s" / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "s" / "tokenizer", local_files_only=True)
    assert ours.encode("1 2 3 1").tolist() == theirs("1 2 3 1")["input_ids"] == [5, 6, 7, 5]
    assert theirs.mask_token_id == ours.info.mask_id and ours.decode([7, 5]) == "3 1"


KILL = """
import os, signal, sys
import data_prep.pcfg as pcfg
made = pcfg.write_shard
def write_shard(folder, split, number, *rest, **named):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(folder, split, number, *rest, **named)
pcfg.write_shard = write_shard
from test_pcfg import make
sys.exit(make(pcfg.Path(sys.argv[1]), "--workers", "1"))
"""


def test_a_killed_run_goes_on_to_the_same_bytes_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    killed = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "k")], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "k" / "index.json").exists()
    assert make(tmp_path / "k", "--workers", "1") == make(tmp_path / "whole", "--workers", "1") == 0
    assert shards_of(tmp_path / "k") == shards_of(tmp_path / "whole")
    before = contents(tmp_path / "k")
    assert make(tmp_path / "k", "--workers", "1") == 0
    assert contents(tmp_path / "k") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cfg3z"], "unknown grammar 'cfg3z'; there are cfg3b, cfg3f, cfg3g, cfg3h, cfg3i"),
        (["cfg3b", "--levels", "7"], "--levels 7: a number from 1 to 6"),
        (["cfg3b", "--train", "0"], "--train 0: at least 1 expected"),
        (["cfg3b", "--seed", "-1"], "--seed -1: at least 0 expected"),
        (["cfg3b", "--sequence-length", "128"], "400 takes all but one in 10000"),
        (["cfg3b", "--levels", "3", "--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_bad_input_says_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["pcfg", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_grammar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "s", "--workers", "1") == 0
    assert main(["pcfg", "cfg3f", "--levels", "3", "--out", str(tmp_path / "s")]) == 2
    assert "their grammar is 'cfg3b', now 'cfg3f'" in capsys.readouterr().err


def test_sentences_longer_than_the_sequence_are_drawn_again(tmp_path: Path) -> None:
    assert make(tmp_path / "s", "--workers", "1", "--sequence-length", "26") == 0
    reader = ShardReader(tmp_path / "s", "train")
    assert len(reader) == 5000 and reader[0].shape == (26,)
    assert json.loads((tmp_path / "s" / "index.json").read_text())["splits"]["train"]["samples"] == 5000
    longest = max(int((reader[i] != 0).sum()) for i in range(5000))
    assert longest == 26


def test_missing_spans_say_where_they_come_from(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="they come with the shards of `python -m data_prep pcfg`"):
        SpanReader(shards, "train")
    assert make(tmp_path / "s", "--workers", "1") == 0
    (tmp_path / "s" / "train-00001.spans.npy").unlink()
    with pytest.raises(ValueError, match=r"holds no parse spans \(train-00001.spans.npy\)"):
        SpanReader(tmp_path / "s", "train")


def test_the_samplers_stream_is_frozen() -> None:
    words = Sampler(load_grammar("cfg3b", 2), 0, 0, 0).draw(3).words
    assert "".join(map(str, words)) == "3232112332112331212332321"


def test_a_sampler_that_leaves_its_grammar_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grammar, "derives", lambda self, sentence: False)
    with pytest.raises(AssertionError, match="does not derive"):
        make(tmp_path / "s", "--workers", "1")
