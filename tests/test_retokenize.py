"""A teacher with another tokenizer: both sides' tokens that end together, and runs that learn from them."""

from __future__ import annotations

import shutil
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from term_case import seen_case
from test_equivalence import assert_close_rows
from tiny import Kill, assert_same_run, config, distill, distill_on_ranks, rows, settings

from data_prep.__main__ import main
from data_prep.encoding import HuggingFaceTokenizer, load_tokenizer
from distill.build import train_samples
from distill.config_reader import load_config
from distill.data import IGNORE, Samples
from distill.distributed import World
from distill.objectives.terms import TERMS
from distill.retokenize import Retokenizer
from distill.teacher import Teacher
from distill.train import train
from distill.trajectory.manifest import load_manifest
from tests.shard_folders import TOPICS, make_shards, train_tokenizer, write_documents

LENGTH = 32
MODEL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
RUN: dict[str, Any] = {"data__task": "clm", "model__overrides": MODEL, "steps": 6, "log__every": 1}
ACROSS = {"relations": 0.5, "contrastive": 0.1, "ckd_hidden": 0.1, "hard": 1.0}


def take(tokenizer: tokenizers.Tokenizer, out: Path, names: str) -> Path:
    """The folder that the tokenizer stage makes of a given one."""
    given = out.with_name(out.name + "-given")
    given.mkdir()
    tokenizer.save(str(given / "tokenizer.json"))
    (given / "tokenizer_config.json").write_text(names)
    assert main(["tokenizer", "--from", str(given), "--out", str(out)]) == 0
    return out


def byte_level(texts: list[str], size: int, out: Path) -> Path:
    """A byte-level BPE of GPT-NeoX's kind."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(
        texts, size, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False
    )
    return take(made._tokenizer, out, '{"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}')


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tokenizers and shards of each."""
    folder = tmp_path_factory.mktemp("words")
    texts = [text + " naïve 日本 😀👩‍👧 x" for text in TOPICS[:40]]
    documents = write_documents(folder / "documents", train=texts[:30], validation=texts[30:])
    assert train_tokenizer(documents, folder / "unigram", "--vocab-size", "600") == 0
    assert train_tokenizer(documents, folder / "bpe", "--vocab-size", "900", "--model", "bpe") == 0
    byte_level(texts, 700, folder / "bytes")
    for name in ("unigram", "bpe", "bytes"):
        out = folder / f"{name}-shards"
        assert make_shards(documents, folder / name, out, "--sequence-length", str(LENGTH)) == 0
    return folder


@pytest.fixture(scope="module")
def teacher_run(made: Path) -> Path:
    """A teacher that reads bytes, of another width than the students."""
    changes = {**RUN, "model__overrides": {**MODEL, "n_embd": 48}, "save__trajectory_every": 6}
    changes["objective__weights"] = {"hard": 1.0}
    distill(["train", *settings(made / "bytes-shards", made / "teacher", **changes)], made).ok()
    return made / "teacher"


def student(made: Path, run_dir: Path, **changes: Any) -> list[str]:
    told = {
        "teacher__trajectory": str(made / "teacher" / "trajectory"),
        "teacher__tokenizer": str(made / "bytes"),
        "objective__weights": ACROSS,
    }
    return settings(made / "unigram-shards", run_dir, **{**RUN, **told, **changes})


def retokenizer(made: Path, own: str, other: str) -> tuple[Retokenizer, Samples]:
    samples = Samples(config(made / f"{own}-shards", made / "none", data__task="clm").data, "train", 0, False)
    return Retokenizer(made / f"{own}-shards", samples.tokenizer, made / other), samples


def text_of(made: Path, name: str, ids: np.ndarray) -> str:
    """With each document's end as one character, its beginning as none; both sides write a text's first space alike."""
    tokenizer = load_tokenizer(made / name)
    info = tokenizer.info
    parts, start = "", 0
    for place in [*np.flatnonzero(np.isin(ids, [info.eos_id, info.bos_id])).tolist(), len(ids)]:
        parts += tokenizer.decode(ids[start:place])
        parts += "\0" if place < len(ids) and ids[place] == info.eos_id else ""
        start = place + 1
    return parts.lstrip("\ufffd")  # of a character whose beginning is in the sequence before


# ------------------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize(("own", "other"), [("unigram", "bytes"), ("bytes", "bpe"), ("bpe", "unigram")])
def test_tokens_of_a_pair_have_the_same_text_behind_them(made: Path, own: str, other: str) -> None:
    told, samples = retokenizer(made, own, other)
    numbers = range(0, len(samples), 29)
    tokens_BL = np.stack([samples.reader[i] for i in numbers]).astype(np.int64)
    out_BL, pairs_M2 = told(tokens_BL)
    assert 0.3 * tokens_BL.size < len(pairs_M2)
    for at, there in pairs_M2:
        (b, i), (c, j) = divmod(int(at), LENGTH), divmod(int(there), out_BL.shape[1])
        assert b == c
        assert text_of(made, own, tokens_BL[b, : i + 1]) == text_of(made, other, out_BL[b, : j + 1])


def test_every_end_that_both_have_is_a_pair(made: Path) -> None:
    """Found by decoding each prefix of both sides, which is slow and needs no offsets."""
    told, samples = retokenizer(made, "unigram", "bytes")
    for number in range(0, len(samples), 97):
        tokens_BL = samples.reader[number].astype(np.int64)[None]
        out_BL, pairs_M2 = told(tokens_BL)
        words = np.flatnonzero(tokens_BL[0] != samples.tokenizer.bos_id)  # of which the bytes have none
        own = {text_of(made, "unigram", tokens_BL[0, : i + 1]): i for i in words.tolist()}
        other = {text_of(made, "bytes", out_BL[0, : j + 1]): j for j in range(out_BL.shape[1])}
        both = {(own[text], other[text]) for text in own if text in other and "\ufffd" not in text and text}
        assert both <= set(map(tuple, pairs_M2.tolist()))


def test_character_of_several_tokens_is_paired_at_its_last_one(made: Path) -> None:
    told, _ = retokenizer(made, "bytes", "bpe")
    here, there = load_tokenizer(made / "bytes"), load_tokenizer(made / "bpe")
    ids = here.encode("日本").astype(np.int64)
    assert len(ids) > 2
    out_BL, pairs_M2 = told(ids[None])
    assert there.decode(out_BL[0]) == "日本"
    assert pairs_M2[-1].tolist() == [len(ids) - 1, out_BL.shape[1] - 1]
    assert 0 not in pairs_M2[:, 0]  # within the first character


WITHIN = (
    "日本語の文 été 😀👩‍👧 ﬁx ½ тест naïve"  # merges of bytes that cross characters, parts of what NFKC makes
)


@pytest.fixture(scope="module")
def awkward(made: Path) -> dict[str, Path]:
    """Tokenizers that put parts of characters, prefixes or normalised text into tokens."""
    folder = made / "awkward"
    folder.mkdir()
    across = byte_level([WITHIN * 3, "本語", "の文"] * 40, 500, folder / "across")

    prefixed = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    prefixed.normalizer = tokenizers.normalizers.NFKC()
    prefixed.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    prefixed.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<|endoftext|>", "<pad>"], show_progress=False
    )
    prefixed.train_from_iterator([WITHIN, *TOPICS[:3]], trainer)
    names = '{"eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<unk>"}'
    return {"across": across, "prefixed": take(prefixed, folder / "prefixed", names)}


@pytest.mark.parametrize("other", ["across", "prefixed"])
def test_end_of_a_token_is_where_all_before_it_has_been_read(
    made: Path, awkward: dict[str, Path], other: str
) -> None:
    """A token may hold a part of a character, or of a ligature, or a space that is not there."""
    told = load_tokenizer(awkward[other])
    tokenizer = HuggingFaceTokenizer(awkward[other] / "tokenizer.json", told.info)
    for text in (WITHIN, *WITHIN.split(), "ing", "日本", *TOPICS[:2]):
        ids, ends = tokenizer.encode_with_ends(text)
        whole = unicodedata.normalize("NFKC", text) if other == "prefixed" else text
        if other == "prefixed" and told.info.unk_id in ids:
            continue
        assert tokenizer.decode(ids) == whole
        for count, end in enumerate(ends, 1):
            if end is not None:
                read = unicodedata.normalize("NFKC", text[:end]) if other == "prefixed" else text[:end]
                assert tokenizer.decode(ids[:count]) == read
        assert ends[-1] == len(text)


def test_sequence_that_begins_within_a_character_goes_on_after_it(made: Path) -> None:
    own = HuggingFaceTokenizer(made / "unigram" / "tokenizer.json", load_tokenizer(made / "unigram").info)
    ids = own.encode("éก กกข then ﬁ½ the end").tolist()  # none of whose letters the tokenizer has seen
    start = next(i for i, number in enumerate(ids) if number in own._continuing)
    text, ends = own.decode_with_ends(ids[start:])
    assert text == "ก กกข then ﬁ½ the end"[-len(text) :] and len(text) > 15
    assert ends[0] is None and ends[-1] == len(text)
    assert own.decode_with_ends(ids)[0] == own.decode(ids)


def test_bytes_that_make_no_character_take_linear_time_and_stay_before_the_mark(made: Path) -> None:
    told, samples = retokenizer(made, "unigram", "bytes")
    own = load_tokenizer(made / "unigram")
    ids = own.encode("ab\ufffd").tolist()
    out_BL, pairs_M2 = told(np.array([[*ids, own.info.eos_id]]))
    assert "\ufffd" in text_of(made, "bytes", out_BL[0]) and len(ids) in pairs_M2[:, 0]
    broken = own.encode("\ufffd" * 3000 + " the").tolist()
    start = time.process_time()
    text, ends = HuggingFaceTokenizer(made / "unigram" / "tokenizer.json", own.info).decode_with_ends(broken)
    assert text.endswith(" the") and ends[-1] == len(text) and len(ends) == len(broken)
    assert time.process_time() - start < 5  # 30 s and more if each step decodes all that waits


def test_sequence_ends_for_the_teacher_at_a_text_that_it_can_not_be_told(
    made: Path, awkward: dict[str, Path]
) -> None:
    info = load_tokenizer(awkward["prefixed"]).info
    shards = made / "prefixed-shards"
    assert make_shards(made / "documents", awkward["prefixed"], shards, "--sequence-length", str(LENGTH)) == 0
    told = Retokenizer(shards, info, made / "bytes")
    words = load_tokenizer(awkward["prefixed"]).encode("return the").tolist()
    whole = told(np.array([[*words, *words]]))
    cut = told(np.array([[*words, info.unk_id, *words]]))
    assert text_of(made, "bytes", whole.tokens_BL[0]).startswith(text_of(made, "bytes", cut.tokens_BL[0]))
    assert cut.pairs_M2[:, 0].max() < len(words) and len(cut.pairs_M2)


def test_name_of_a_control_token_in_a_text_is_cut_as_in_the_shards(made: Path) -> None:
    tokenizer = HuggingFaceTokenizer(made / "bytes" / "tokenizer.json", load_tokenizer(made / "bytes").info)
    for text in ("a <|endoftext|> b", "<|padding|>", "return x"):
        ids, ends = tokenizer.encode_with_ends(text)
        assert ids == tokenizer.encode(text).tolist() and ends[-1] == len(text)


def test_marks_stand_for_marks_and_one_that_only_the_teacher_has_follows_the_end(made: Path) -> None:
    bytes_info, bpe_info = (load_tokenizer(made / name).info for name in ("bytes", "bpe"))
    word = load_tokenizer(made / "bytes").encode("return").tolist()
    told, _ = retokenizer(made, "bytes", "bpe")
    out_BL, pairs_M2 = told(np.array([[*word, bytes_info.eos_id, *word, bytes_info.pad_id]]))
    end = out_BL[0].tolist().index(bpe_info.eos_id)
    assert out_BL[0, end + 1] == bpe_info.bos_id
    assert [len(word), end + 1] in pairs_M2.tolist() and [len(word), end] not in pairs_M2.tolist()

    back, _ = retokenizer(made, "bpe", "bytes")
    word = load_tokenizer(made / "bpe").encode("return").tolist()
    out_BL, pairs_M2 = back(np.array([[bpe_info.bos_id, *word, bpe_info.eos_id]]))
    assert out_BL[0].tolist()[-1] == bytes_info.eos_id and (out_BL == bytes_info.eos_id).sum() == 1
    assert 0 not in pairs_M2[:, 0] and pairs_M2[-1].tolist() == [len(word) + 1, out_BL.shape[1] - 1]


def test_longer_sequence_is_cut_and_a_shorter_one_padded(made: Path) -> None:
    told, _ = retokenizer(made, "unigram", "bytes")
    own = load_tokenizer(made / "unigram")
    short, long = own.encode("the").astype(np.int64), own.encode("日本" * 20).astype(np.int64)[:12]
    both = np.full((2, 12), own.info.pad_id)
    both[0, : len(short)], both[1, : len(long)] = short, long
    out_BL, pairs_M2 = told(both)
    assert out_BL.shape[1] == 12
    assert (out_BL[0, 3:] == told.info.pad_id).all() and (out_BL[1] != told.info.pad_id).all()
    ends = [other - 12 for own, other in pairs_M2.tolist() if own >= 12]
    assert ends == [2, 5, 8, 11]  # a character is three bytes


def test_only_rows_that_count_are_compared(made: Path) -> None:
    told, samples = retokenizer(made, "unigram", "bytes")
    samples.retokenizer = told
    batch = samples[np.arange(8)]
    assert batch.retold is not None
    labels = np.full(8 * LENGTH, IGNORE)
    labels[batch.rows_N] = batch.labels_N
    pairs = told(np.stack([samples.reader[i] for i in range(8)]).astype(np.int64)).pairs_M2
    counted = pairs[labels[pairs[:, 0]] != IGNORE]
    assert len(counted) < len(pairs)
    assert batch.rows_N[batch.retold.matches_M].tolist() == counted[:, 0].tolist()
    assert batch.retold.rows_M.tolist() == counted[:, 1].tolist()


def test_batch_takes_what_is_told_along_to_a_device_and_into_a_batch_without_rows(made: Path) -> None:
    told, samples = retokenizer(made, "unigram", "bytes")
    samples.retokenizer = told
    batch = samples[np.arange(3)]
    moved = batch._map(torch.clone).retold
    assert batch.retold is not None and moved is not None
    for one, other in zip(
        (*batch.retold.inputs, *batch.retold[1:]), (*moved.inputs, *moved[1:]), strict=True
    ):
        assert (one is None and other is None) or (one is not other and torch.equal(one, other))
    empty = batch.without_rows().retold
    assert empty is not None and len(empty.rows_M) == len(empty.matches_M) == 0
    assert torch.equal(empty.inputs.input_ids_BL, batch.retold.inputs.input_ids_BL)


# ------------------------------------------------------------------------------------------------ terms and runs


@pytest.mark.parametrize("name", ["relations", "contrastive", "ckd_hidden"])
def test_term_is_that_of_the_rows_which_both_have(name: str) -> None:
    seen = seen_case(learns=name)
    matches_M = torch.tensor([5, 0, 3])
    there = seen.live._replace(
        hidden_ND=seen.live.hidden_ND[matches_M], inside=seen.live.inside._replace(matches_M=matches_M)
    )
    here = seen.student._replace(hidden_ND=seen.student.hidden_ND[matches_M])
    alone = replace(
        seen,
        student=here,
        teacher=seen.live._replace(hidden_ND=there.hidden_ND),
        labels_N=seen.labels_N[matches_M],
        sequence_N=seen.sequence_N[matches_M],
    )
    torch.testing.assert_close(
        TERMS[name].function(replace(seen, teacher=there)), TERMS[name].function(alone)
    )
    none = there._replace(
        hidden_ND=there.hidden_ND[:0], inside=there.inside._replace(matches_M=matches_M[:0])
    )
    assert TERMS[name].function(replace(seen, teacher=none)) == 0


def test_teacher_reads_its_own_tokens(made: Path, teacher_run: Path) -> None:
    told, samples = retokenizer(made, "unigram", "bytes")
    samples.retokenizer = told
    batch = samples[np.arange(4)]
    assert batch.retold is not None
    manifest = load_manifest(teacher_run / "trajectory")
    teacher = Teacher(
        manifest,
        config(made / "unigram-shards", made / "none", data__task="clm"),
        told.info,
        LENGTH,
        World(0, 1, 0, torch.device("cpu")),
    )
    teacher.use(6)
    said = teacher.signal(batch)
    teacher.close()
    assert teacher.model is not None and said.inside.matches_M is not None
    whole = teacher.model(
        input_ids=batch.retold.inputs.input_ids_BL,
        attention_mask=(batch.retold.inputs.input_ids_BL != told.info.pad_id).long(),
        output_hidden_states=True,
    )
    torch.testing.assert_close(
        said.hidden_ND, whole.hidden_states[-1].flatten(0, 1)[batch.retold.rows_M].detach()
    )


def test_student_learns_from_a_teacher_with_other_words(
    made: Path, teacher_run: Path, tmp_path: Path
) -> None:
    ended = distill(["train", *student(made, tmp_path / "run", steps=30)], tmp_path).ok()
    assert "of the tokens that count" in ended.output
    first, *_, last = rows(tmp_path / "run", "train")
    assert all(0 < last[f"term_{name}"] < first[f"term_{name}"] for name in ACROSS if name != "hard")
    total = sum(weight * last[f"term_{name}" if name != "hard" else name] for name, weight in ACROSS.items())
    assert last["loss"] == pytest.approx(total, rel=1e-4)
    assert last["soft"] == 0


def test_such_a_run_goes_on_after_a_kill_to_the_same_bits(
    made: Path, teacher_run: Path, tmp_path: Path
) -> None:
    distill(["train", *student(made, tmp_path / "calm", save__every=2)], tmp_path).ok()
    arguments = ["train", *student(made, tmp_path / "run", save__every=2, data__num_workers=1)]
    assert distill(arguments, tmp_path, Kill("distill.engine:Engine.step", 5)).code == -9
    moved = shutil.copytree(made / "bytes", tmp_path / "moved")
    again = student(made, tmp_path / "run", save__every=2, teacher__tokenizer=str(moved))
    distill(["train", *again], tmp_path).ok()
    assert_same_run(tmp_path / "run", tmp_path / "calm")


def test_fingerprint_of_the_samples_names_what_the_teacher_is_told(made: Path) -> None:
    told, samples = retokenizer(made, "unigram", "bytes")
    plain = samples.fingerprint
    samples.retokenizer = told
    other, _ = retokenizer(made, "unigram", "bpe")
    with_bytes = samples.fingerprint
    samples.retokenizer = other
    assert len({plain, with_bytes, samples.fingerprint}) == 3


def test_student_and_teacher_may_both_be_split_over_ranks(
    made: Path, teacher_run: Path, tmp_path: Path
) -> None:
    steady = {"optim__eps": 1e-3, "objective__weights": {**ACROSS, "contrastive": 0.0}, "micro_batch_size": 4}
    distill(["train", *student(made, tmp_path / "one", **steady)], tmp_path).ok()
    split = student(made, tmp_path / "two", engine__zero_stage=3, teacher__zero_stage=3, **steady)
    for ended in distill_on_ranks(["train", *split], tmp_path, 2):
        ended.ok()
    assert_close_rows(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objective__weights": {"forward_kl": 1.0}},
            "names forward_kl, which needs a common vocabulary: choose among",
        ),
        ({"data__task": "mlm", "model__overrides": {}}, "it needs data.task=clm"),
        ({"teacher__ensemble": 2}, "that needs one live teacher"),
        ({"teacher__tokenizer": "unigram"}, "is the tokenizer of .*-shards itself: leave it out"),
        ({"teacher__tokenizer": "bpe"}, r"not with .* \(or teacher.tokenizer\)"),
        ({"teacher__tokenizer": "documents"}, "has no tokenizer_info.json"),
        (
            {"teacher__tokenizer": ""},
            "make shards with the teacher's tokenizer .* or name that in teacher.tokenizer",
        ),
        (
            {"objective__weights": {"hard": 1, "relation": 1}},
            r"1 problem.*\n.*weights.relation is unknown; did you mean relations\?$",
        ),
    ],
)
def test_what_can_not_be_compared_is_refused(
    changes: dict[str, Any], said: str, made: Path, teacher_run: Path, tmp_path: Path
) -> None:
    if name := changes.get("teacher__tokenizer"):
        changes = {"teacher__tokenizer": str(made / name)}
    with pytest.raises(ValueError, match=said):
        train(load_config([], student(made, tmp_path / "run", **changes)))


def test_tokenizer_of_other_text_is_refused(made: Path, tmp_path: Path) -> None:
    vocabulary = {str(i): i for i in range(10)} | {"<unk>": 10, "</s>": 11, "<pad>": 12}
    digits = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    names = '{"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}'
    given = take(digits, tmp_path / "digits", names)
    with pytest.raises(ValueError, match="tokens [0-9]% end where one of .* is it a tokenizer for such text"):
        train_samples(load_config([], student(made, tmp_path / "run", teacher__tokenizer=str(given))))


def test_such_a_teacher_is_not_scored(made: Path, teacher_run: Path, tmp_path: Path) -> None:
    ended = distill(
        ["score", *student(made, tmp_path / "run"), "--out", str(tmp_path / "targets"), "--codec", "top_k"],
        tmp_path,
    )
    assert ended.code == 2 and "targets speak of the shards' tokens" in ended.output
