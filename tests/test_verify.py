"""`verify` finds what is wrong with a shards folder and names it."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.__main__ import main
from data_prep.shards import ShardIndex, ShardReader, TokenizerInfo, write_shards
from tests.shard_folders import TOPICS, make_shards, train_tokenizer, write_documents


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_documents(root / "documents", train=TOPICS, validation=TOPICS[:7])
    assert train_tokenizer(root / "documents", root / "tokenizer", "--model", "bpe") == 0
    assert train_tokenizer(root / "documents", root / "other", "--model", "bpe", "--vocab-size", "2001") == 0
    return root


@pytest.fixture
def shards(sources: Path, tmp_path: Path) -> Path:
    assert make_shards(sources / "documents", sources / "tokenizer", tmp_path / "shards") == 0
    return tmp_path / "shards"


def verify(shards: Path, *more: str) -> int:
    return main(["verify", str(shards), "--workers", "1", *more])


def rewrite_index(shards: Path, old: str, new: str) -> None:
    text = (shards / "index.json").read_text()
    assert old in text
    (shards / "index.json").write_text(text.replace(old, new, 1))


def test_what_the_stage_wrote_is_all_well(
    shards: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(shards, "--tokenizer", str(sources / "tokenizer")) == 0
    report = capsys.readouterr().out
    assert "all well" in report and "FAULT" not in report and "train: 2 shards" in report


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # WebDataset leaves its files open
def test_stock_webdataset_gives_the_samples_of_the_reader(shards: Path) -> None:
    reader = ShardReader(shards, "train")
    urls = [str(shards / shard.name) for shard in reader.index.splits["train"].shards]
    number = 0
    for number, sample in enumerate(webdataset.WebDataset(urls, shardshuffle=False).decode(), start=1):
        assert sample["__key__"] == f"{number - 1:09d}"
        np.testing.assert_array_equal(sample["tokens.npy"], reader[number - 1])
    assert number == len(reader)


def test_workers_find_the_same_faults(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "validation-00000.tar").unlink()
    assert main(["verify", str(shards), "--workers", "2"]) == 1
    assert "FAULT validation-00000.tar" in capsys.readouterr().out


def test_a_flipped_byte_in_a_token_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((shards / "train-00000.tar").read_bytes())
    content[512 + 128 + 1] ^= 0xF0  # the high byte of the first token
    (shards / "train-00000.tar").write_bytes(content)
    assert verify(shards) == 1
    report = capsys.readouterr().out
    assert "has sha256" in report and "the vocabulary has 2000" in report and "2 faults" in report


def test_a_flipped_byte_in_a_header_is_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((shards / "train-00000.tar").read_bytes())
    content[1024 + 3] ^= 1
    (shards / "train-00000.tar").write_bytes(content)
    assert verify(shards) == 1
    assert capsys.readouterr().out.count("FAULT train-00000.tar") == 2


@pytest.mark.parametrize("cut", [1, 600, 1024 * 10 + 700])
def test_a_truncated_shard_is_found(shards: Path, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    path = shards / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-cut])
    assert verify(shards) == 1
    assert f"FAULT train-00000.tar: {path} has" in capsys.readouterr().out


def test_a_missing_and_a_stray_shard_are_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "train-00000.tar").rename(shards / "train-00007.tar")
    assert verify(shards) == 1
    report = capsys.readouterr().out
    assert "train-00000.tar is missing" in report and "train-00007.tar: not in the index" in report


def test_shards_of_another_tokenizer_are_found(
    shards: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(shards, "--tokenizer", str(sources / "other")) == 1
    assert "the shards were made with TokenizerInfo" in capsys.readouterr().out
    for path in (sources / "other").iterdir():
        (shards / "tokenizer" / path.name).write_bytes(path.read_bytes())
    assert verify(shards) == 1


def test_a_changed_or_missing_tokenizer_copy_is_found(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards / "tokenizer" / "tokenizer.json").write_text("{}")
    assert verify(shards) == 1
    assert "tokenizer.json has changed" in capsys.readouterr().out
    (shards / "tokenizer" / "tokenizer_info.json").unlink()
    assert verify(shards) == 1
    assert "has no tokenizer_info.json" in capsys.readouterr().out


def test_wrong_counts_are_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ShardIndex.load(shards).splits["validation"].tokens
    values = json.loads((shards / "index.json").read_text())
    values["splits"]["validation"]["tokens"] = tokens + 1
    values["splits"]["validation"]["shards"][0]["tokens"] = tokens + 1
    (shards / "index.json").write_text(json.dumps(values))
    assert verify(shards) == 1
    assert f"{tokens} tokens in the tar" in capsys.readouterr().out


def test_documents_that_do_not_add_up_are_found(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = len(TOPICS) + 7
    rewrite_index(shards, f'"kept": {kept}', f'"kept": {kept - 1}')
    assert verify(shards) == 1
    report = capsys.readouterr().out
    assert f"{kept - 1} kept and 3 dropped" in report
    assert f"{kept} ends found in the shards" not in report or f"{kept - 1} kept by" in report


def test_an_empty_split_is_found(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path / "documents", train=TOPICS[:9])
    assert make_shards(tmp_path / "documents", sources / "tokenizer", tmp_path / "shards") == 0
    assert verify(tmp_path / "shards") == 1
    assert "FAULT validation: the split is empty" in capsys.readouterr().out


def test_samples_out_of_order_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = TokenizerInfo("0" * 64, vocab_size=100, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=4)
    write_shards(tmp_path, {"train": np.full((20, 8), 9)}, info, sequence_length=8, samples_per_shard=10)
    first, second = ((tmp_path / f"train-0000{number}.tar") for number in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert verify(tmp_path) == 1
    assert "sample '000000010' stands where 000000000 belongs" in capsys.readouterr().out


def test_another_type_or_length_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = TokenizerInfo("0" * 64, vocab_size=100, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=4)
    write_shards(tmp_path, {"train": np.full((2, 8), 9)}, info, sequence_length=8)
    rewrite_index(tmp_path, '"sequence_length": 8', '"sequence_length": 16')
    assert verify(tmp_path) == 1
    assert "shape and type ((8,), dtype('uint16')), ((16,)" in capsys.readouterr().out


def test_without_an_index_there_is_nothing_to_check_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tmp_path) == 2
    assert "index.json is missing" in capsys.readouterr().err
