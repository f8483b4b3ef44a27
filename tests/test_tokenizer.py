"""The tokenizer stage: training is deterministic, Hugging Face agrees with SentencePiece, specials never come
out of text.
"""

import json
from pathlib import Path

import pytest
import sentencepiece as spm
import tokenizers
from transformers import AutoTokenizer, BertTokenizer

from data_prep.__main__ import main
from data_prep.encoding import load_tokenizer, slices
from data_prep.files import write_json
from tests.shard_folders import TOPICS, train_tokenizer, write_documents

AWKWARD = [
    " leading space",
    "two  spaces   three",
    "trailing space ",
    "\n\n= Heading =\n\nline\n indented\n",
    "Ünïcödé été naïve",
    "日本語のテキスト 中文",
    "emoji 😀👩‍👩‍👧 done",
    "tab\there",
    "\r\n",
    "---- --- 6666 666 aaaaaaaaaaaa",
    "a" * 300,
    "",
    "\n",
    " ",
]
SPECIALS_IN_TEXT = "</s> <s> <mask><pad> <unk> x</s>y <0x41> <mask>"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents", train=TOPICS)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def folder(request: pytest.FixtureRequest, documents: Path) -> Path:
    out = documents.parent / request.param
    assert train_tokenizer(documents, out, "--model", request.param) == 0
    return out


def test_special_ids_and_identity_are_recorded(folder: Path) -> None:
    info = load_tokenizer(folder).info
    assert (info.pad_id, info.unk_id, info.bos_id, info.eos_id, info.mask_id) == (0, 1, 2, 3, 4)
    assert info.vocab_size == 2000 and info.dtype == "uint16" and len(info.sha256) == 64


def test_decode_gives_the_text_back(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in [*TOPICS, *AWKWARD, SPECIALS_IN_TEXT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_those_of_sentencepiece(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    bare = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in [*"\n".join(TOPICS).split("\n"), *AWKWARD, SPECIALS_IN_TEXT]:
        assert tokenizer.encode(text).tolist() == bare.encode(text), text


def test_auto_tokenizer_gives_the_same_ids_and_specials(folder: Path) -> None:
    tokenizer, auto = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    specials = (
        auto.pad_token_id,
        auto.unk_token_id,
        auto.bos_token_id,
        auto.eos_token_id,
        auto.mask_token_id,
    )
    assert specials == (0, 1, 2, 3, 4)
    for text in [*TOPICS, *AWKWARD]:
        assert auto(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist(), text
        assert auto.decode(tokenizer.encode(text)) == text


def test_auto_tokenizer_begins_with_bos_and_leaves_the_end_open(folder: Path) -> None:
    auto = AutoTokenizer.from_pretrained(folder)
    assert auto("The class").input_ids == [2, *auto("The class", add_special_tokens=False).input_ids]


def test_auto_tokenizer_knows_the_mask_and_its_space(folder: Path) -> None:
    auto = AutoTokenizer.from_pretrained(folder)
    ids = auto("The <mask> statement", add_special_tokens=False).input_ids
    the, statement = (load_tokenizer(folder).encode(text).tolist() for text in ("The", " statement"))
    assert ids == [*the, 4, *statement]


def test_special_tokens_spelled_in_a_text_stay_text(folder: Path) -> None:
    ids = load_tokenizer(folder).encode(SPECIALS_IN_TEXT).tolist()
    auto = AutoTokenizer.from_pretrained(folder)
    assert min(ids) > 4
    assert auto(SPECIALS_IN_TEXT, add_special_tokens=False, split_special_tokens=True).input_ids == ids


def test_same_documents_give_the_same_files_in_any_order(folder: Path, tmp_path: Path) -> None:
    other = write_documents(tmp_path / "documents", train=TOPICS[:50])
    both = [folder.parent / "documents", other]
    results = []
    for name, order in (("a", both), ("b", both[::-1])):
        arguments = [str(path) for path in order]
        out = tmp_path / name
        kind = ["--model", folder.name, "--vocab-size", "1500"]
        assert main(["tokenizer", *arguments, "--out", str(out), *kind]) == 0
        results.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert results[0] == results[1]


def test_the_sample_is_bounded(documents: Path, tmp_path: Path) -> None:
    assert train_tokenizer(documents, tmp_path / "small", "--sample-megabytes", "0.2", "--model", "bpe") == 0
    assert load_tokenizer(tmp_path / "small").info != load_tokenizer_of(documents, "bpe", tmp_path)


def load_tokenizer_of(documents: Path, model: str, tmp_path: Path) -> object:
    assert train_tokenizer(documents, tmp_path / "whole", "--model", model) == 0
    return load_tokenizer(tmp_path / "whole").info


def test_a_finished_folder_is_kept_and_another_run_refused(
    folder: Path, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_tokenizer(documents, folder, "--model", folder.name) == 0
    assert "is complete" in capsys.readouterr().err
    assert train_tokenizer(documents, folder, "--model", folder.name, "--sample-megabytes", "1") == 2
    assert "its sample_megabytes is 200, now 1.0" in capsys.readouterr().err


def test_a_changed_model_file_is_refused(documents: Path, tmp_path: Path) -> None:
    assert train_tokenizer(documents, tmp_path / "t", "--model", "bpe") == 0
    path = tmp_path / "t" / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="tokenizer.model has changed"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(("size", "message"), [("200000", "cannot train"), ("100", "cannot train")])
def test_impossible_vocabulary_sizes_are_refused(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, message: str
) -> None:
    assert main(["tokenizer", str(documents), "--out", str(tmp_path / "t"), "--vocab-size", size]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t" / "tokenizer_info.json").exists()


def test_documents_without_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_documents(tmp_path / "documents", validation=TOPICS[:1])
    assert train_tokenizer(empty, tmp_path / "t") == 2
    assert "has no train parts" in capsys.readouterr().err


def test_a_given_sentencepiece_model_is_taken_over(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "taken"
    assert main(["tokenizer", "--from", str(folder / "tokenizer.model"), "--out", str(out)]) == 0
    assert load_tokenizer(out).info == load_tokenizer(folder).info
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_given_model_with_normalisation_and_prefix_agrees_with_its_twin(tmp_path: Path, kind: str) -> None:
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(TOPICS).split("\n")),
        model_prefix=str(tmp_path / "given"),
        vocab_size=1000,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
    )
    assert main(["tokenizer", "--from", str(tmp_path / "given.model"), "--out", str(tmp_path / "t")]) == 0
    tokenizer, auto = load_tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")
    assert (tokenizer.info.pad_id, tokenizer.info.mask_id) == (0, None)  # byte fallback: unk never comes
    lines = [line for text in TOPICS[::20] for line in text.split("\n") if line.strip()]
    agree = [
        auto(line, add_special_tokens=False).input_ids == tokenizer.encode(line).tolist() for line in lines
    ]
    assert sum(agree) >= 0.999 * len(agree)  # its scores are not rounded: ties may break the other way


def byte_level_folder(path: Path, special: list[str]) -> Path:
    """A Hugging Face folder in the manner of GPT-2, trained here."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TOPICS[:100], vocab_size=1000, special_tokens=special, show_progress=False)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    return path


def test_a_given_hugging_face_folder_keeps_its_ids(tmp_path: Path) -> None:
    given = byte_level_folder(tmp_path / "given", ["<|endoftext|>", "<|padding|>"])
    assert main(["tokenizer", "--from", str(given), "--out", str(tmp_path / "t")]) == 0
    tokenizer, auto = load_tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(given)
    info = tokenizer.info
    assert (info.pad_id, info.bos_id, info.eos_id, info.mask_id) == (1, 0, 0, None)
    for text in [*TOPICS[:20], *AWKWARD]:
        assert tokenizer.encode(text).tolist() == auto(text).input_ids
    assert 0 not in tokenizer.encode("a <|endoftext|> b")


def test_a_given_tokenizer_without_padding_needs_one_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = byte_level_folder(tmp_path / "given", ["<|endoftext|>"])
    take = ["tokenizer", "--from", str(given), "--out", str(tmp_path / "t")]
    assert main(take) == 2
    assert "--pad-token" in capsys.readouterr().err
    assert main([*take, "--pad-token", "nonsense"]) == 2
    assert main([*take, "--pad-token", "!"]) == 0
    assert load_tokenizer(tmp_path / "t").info.pad_id == AutoTokenizer.from_pretrained(given).vocab["!"]


@pytest.mark.parametrize(
    ("special", "advice"),
    [
        (["<|endoftext|>"], "or add one to the tokenizer"),
        (["<|endoftext|>", "<|spare|>"], "another one with --pad-token, such as '<|spare|>'"),
    ],
)
def test_padding_with_the_end_of_sequence_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], special: list[str], advice: str
) -> None:
    given = byte_level_folder(tmp_path / "given", special)
    take = ["tokenizer", "--from", str(given), "--out", str(tmp_path / "t")]
    assert main([*take, "--pad-token", "<|endoftext|>"]) == 2
    error = capsys.readouterr().err
    assert "is also the end-of-sequence token" in error and advice in error
    write_json(given / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    assert main(take) == 2
    assert capsys.readouterr().err == error


def test_a_sentencepiece_model_that_pads_with_its_end_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take = ["tokenizer", "--from", str(folder / "tokenizer.model"), "--out", str(tmp_path / "t")]
    assert main([*take, "--pad-token", "</s>"]) == 2
    assert "is also the end-of-sequence token" in capsys.readouterr().err


def test_a_bert_folder_is_taken_with_its_own_names(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "class", "##es", "[", "]", "mask"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    assert main(["tokenizer", "--from", str(tmp_path / "bert"), "--out", str(tmp_path / "t")]) == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    info = tokenizer.info
    assert (info.pad_id, info.unk_id, info.bos_id, info.eos_id, info.mask_id) == (0, 1, 2, 3, 4)
    assert tokenizer.encode("The classes [MASK]").tolist() == [5, 6, 7, 8, 10, 9]


def test_bad_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "noise.model").write_bytes(b"not a model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text(json.dumps({"model": {}}))
    for path in ("noise.model", "broken", "absent"):
        assert main(["tokenizer", "--from", str(tmp_path / path), "--out", str(tmp_path / "t")]) == 2
        assert path in capsys.readouterr().err
    assert main(["tokenizer", "--out", str(tmp_path / "t")]) == 2
    assert "give either" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tokenizer_info.json"):
        load_tokenizer(tmp_path / "broken")


def test_slices_join_to_the_text_and_end_at_lines_or_words() -> None:
    text = "one two\nthree four five\n" + "x" * 30
    parts = list(slices(text, 12))
    assert "".join(parts) == text and max(map(len, parts)) <= 12
    assert parts[0] == "one two\n" and parts[1] == "three four" and parts[2] == " five\n"


def test_a_text_of_many_slices_has_the_ids_of_the_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = load_tokenizer(folder), "\n".join(TOPICS[:10])
    whole = tokenizer.encode(text).tolist()
    monkeypatch.setattr("data_prep.encoding.slices", lambda text: slices(text, 1000))
    assert tokenizer.encode(text).tolist() == whole
