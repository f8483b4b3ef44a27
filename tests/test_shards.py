"""The shards folder: same input, same bytes; random access; nothing wrong is read; a killed run goes on."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import blocks, journal, pack
from data_prep.blocks import blocks_of_part, encode_block
from data_prep.encoding import load_tokenizer
from data_prep.files import sha256_of
from data_prep.shards import CorruptShard, ShardIndex, ShardReader, TokenizerInfo, write_shards
from data_prep.tar_records import RecordLayout, tar_records
from tests.shard_folders import TOPICS, held, make_shards, train_tokenizer, write_documents

GOLDEN = "272899b76ec0fa3990556e8a6a33522b729daadc73b8e448238c724b44ba7267"
INFO = TokenizerInfo("0" * 64, vocab_size=100, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=4)


def sequences(number: int, length: int = 16, vocab_size: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (number, length)).astype(np.uint16)


def write_small(folder: Path, number: int = 25) -> np.ndarray:
    tokens_NL = sequences(number)
    write_shards(folder, {"train": tokens_NL}, INFO, sequence_length=16, samples_per_shard=10)
    return tokens_NL


def tars(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.tar")}


# --- the format and its reader


def test_every_sample_is_read_back_by_number(tmp_path: Path) -> None:
    tokens_NL = write_small(tmp_path)
    reader = ShardReader(tmp_path, "train")
    assert len(reader) == 25 and [shard.samples for shard in reader.index.splits["train"].shards] == [
        10,
        10,
        5,
    ]
    for number in (24, 0, 9, 10, 19, 20):
        assert reader[number].dtype == np.uint16 and reader[number].flags.writeable
        np.testing.assert_array_equal(reader[number], tokens_NL[number])


def test_a_pickled_reader_opens_its_own_shards(tmp_path: Path) -> None:
    tokens_NL = write_small(tmp_path)
    reader = ShardReader(tmp_path, "train")
    np.testing.assert_array_equal(reader[3], tokens_NL[3])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(reader))[12], tokens_NL[12])


def test_more_shards_than_may_be_open_at_once_are_read(tmp_path: Path) -> None:
    tokens_NL = sequences(100)
    write_shards(tmp_path, {"train": tokens_NL}, INFO, sequence_length=16, samples_per_shard=1)
    reader = ShardReader(tmp_path, "train")
    for number in [*range(100), 0, 99]:
        np.testing.assert_array_equal(reader[number], tokens_NL[number])


def test_a_big_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    info = TokenizerInfo("0" * 64, vocab_size=70000, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=None)
    write_shards(tmp_path, {"train": [np.full(8, 69999)]}, info, sequence_length=8)
    assert ShardReader(tmp_path, "train")[0].tolist() == [69999] * 8
    assert ShardIndex.load(tmp_path).dtype == "uint32"


def test_members_are_those_that_tarfile_would_write() -> None:
    layout = RecordLayout(128, "uint16")
    records = tar_records(np.zeros((3, 128)), 987654320, layout)
    for number, record in enumerate(records):
        member = tarfile.TarInfo(f"{987654320 + number:09d}.tokens.npy")
        member.size = 128 + 256
        assert record[:512].tobytes() == member.tobuf(tarfile.USTAR_FORMAT)
    assert layout.record_bytes == 1024


def test_bytes_of_a_shard_never_change(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": [np.arange(16)]}, INFO, sequence_length=16)
    assert sha256_of(tmp_path / "train-00000.tar") == GOLDEN


@pytest.mark.parametrize("number", [-1, 25, 10**9])
def test_a_number_outside_the_split_is_an_index_error(tmp_path: Path, number: int) -> None:
    write_small(tmp_path)
    with pytest.raises(IndexError, match="which has 25"):
        ShardReader(tmp_path, "train")[number]


def test_wrong_sequences_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(15,\), \(16,\) expected"):
        write_shards(tmp_path, {"train": [np.zeros(15)]}, INFO, sequence_length=16)
    with pytest.raises(ValueError, match="ids 0..100, 0..99 expected"):
        write_shards(tmp_path, {"train": [np.array([0] * 15 + [100])]}, INFO, sequence_length=16)
    assert not (tmp_path / "index.json").exists()


def damage(folder: Path, how: str) -> None:
    path = folder / "train-00001.tar"
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[5000] ^= 1
    elif how == "truncated":
        del content[-512:]
    path.unlink()
    if how != "missing":
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", "has sha256 .* expected"),
        ("truncated", "has 10752 bytes, 11264 expected"),
        ("missing", "is missing"),
    ],
)
def test_a_damaged_shard_is_named_when_first_opened(tmp_path: Path, how: str, message: str) -> None:
    write_small(tmp_path)
    damage(tmp_path, how)
    reader = ShardReader(tmp_path, "train")
    assert reader[9].shape == (16,)
    with pytest.raises(CorruptShard, match=f"train-00001.tar {message}.*run the shards command again"):
        reader[10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"dtype": "uint32"}, "dtype is 'uint32', 100 ids need uint16"),
        ({"splits": {"train": {"samples": 3, "tokens": 0, "shards": []}}}, "the split says 3"),
        ({"splits": {"train": {"samples": 3}}}, "lacks or misspells a field"),
        ({"tokenizer": {"sha256": ""}}, "lacks or misspells a field"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write_small(tmp_path)
    values = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match=message):
        ShardIndex.load(tmp_path)


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    write_small(tmp_path)
    text = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(text.replace("train-00000.tar", "../train-00000.tar"))
    with pytest.raises(ValueError, match="is not a plain file name"):
        ShardIndex.load(tmp_path)


def test_a_missing_index_or_split_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="index.json is missing"):
        ShardReader(tmp_path, "train")
    write_small(tmp_path)
    with pytest.raises(ValueError, match="no split 'validation'; it has train"):
        ShardReader(tmp_path, "validation")


# --- the stage


@pytest.fixture(autouse=True)
def small_texts_keep_processes_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "BYTES_PER_WORKER", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents, two tokenizers and the shards of the first."""
    root = tmp_path_factory.mktemp("made")
    write_documents(root / "documents", train=TOPICS * 3, validation=TOPICS[:7])
    for number, name in enumerate(("tokenizer", "other")):
        assert (
            train_tokenizer(
                root / "documents", root / name, "--model", "bpe", "--vocab-size", f"{2000 + number}"
            )
            == 0
        )
    assert make_shards(root / "documents", root / "tokenizer", root / "shards") == 0
    return root


def documents_of(folder: Path, split: str) -> Iterator[list[int]]:
    reader = ShardReader(folder, split)
    ids: list[int] = []
    for number in range(len(reader)):
        for token in reader[number].tolist():
            ids += [token] if token != 0 else []
            if token == 3:
                yield ids
                ids = []
    assert ids == []


def test_documents_come_back_whole_and_in_order(made: Path) -> None:
    tokenizer = load_tokenizer(made / "shards" / "tokenizer")
    for split, texts in (("train", TOPICS * 3), ("validation", TOPICS[:7])):
        found = list(documents_of(made / "shards", split))
        assert all(ids[0] == 2 and ids[-1] == 3 for ids in found)
        assert [tokenizer.decode(ids[1:-1]) for ids in found] == texts


def test_the_index_says_what_was_made(made: Path) -> None:
    index = ShardIndex.load(made / "shards")
    train = index.splits["train"]
    assert len(train.shards) >= 3 and train.tokens <= train.samples * 128
    assert index.tokenizer == load_tokenizer(made / "tokenizer").info
    assert index.documents == {
        "in": len(TOPICS) * 3 + 10,
        "kept": len(TOPICS) * 3 + 7,
        "dropped": {"short": 3},
    }
    assert "--sequence-length 128" in index.command and "workers" not in index.command


def test_only_the_last_sequence_of_a_part_is_padded(made: Path) -> None:
    reader = ShardReader(made / "shards", "train")
    padded = sum(bool((reader[number] == 0).any()) for number in range(len(reader)))
    assert padded <= len(list((made / "documents").glob("train-*")))


def test_any_number_of_workers_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    assert make_shards(made / "documents", made / "tokenizer", tmp_path / "shards", "--workers", "3") == 0
    assert tars(tmp_path / "shards") == tars(made / "shards")


def test_blocks_of_a_part_join_to_the_whole(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made / "documents" / "train-00000.jsonl.zst"
    index = json.loads((made / "documents" / "index.json").read_text())
    size = next(part["json_bytes"] for part in index["parts"] if part["name"] == path.name)
    (whole,) = blocks_of_part(path, "train", 0, size, made / "tokenizer")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size // 7)
    cut = blocks_of_part(path, "train", 0, size, made / "tokenizer")
    assert len(cut) > 5 and sum(block.is_last for block in cut) == 1
    joined = np.concatenate([encode_block(block).tokens for block in cut])
    np.testing.assert_array_equal(joined, encode_block(whole).tokens)


def test_a_tokenizer_with_one_mark_puts_it_behind_documents_only(made: Path) -> None:
    info = load_tokenizer(made / "tokenizer").info
    before, behind = blocks._marks(TokenizerInfo(info.sha256, 2000, 1, None, 0, 0, None))
    assert before.tolist() == [] and behind.tolist() == [0]


def test_a_finished_run_is_not_repeated(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {path: path.stat().st_mtime_ns for path in (made / "shards").rglob("*")}
    assert make_shards(made / "documents", made / "tokenizer", made / "shards") == 0
    assert "is complete" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in (made / "shards").rglob("*")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sequence-length", "64"], "their sequence_length is 128, now 64"),
        (["--shard-megabytes", "2"], "their shard_megabytes is 1, now 2"),
    ],
)
def test_a_run_with_other_arguments_is_refused(
    made: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert make_shards(made / "documents", made / "tokenizer", made / "shards", *more) == 2
    assert message in capsys.readouterr().err


def test_a_run_with_another_tokenizer_or_other_documents_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_shards(made / "documents", made / "other", made / "shards") == 2
    assert "their tokenizer is" in capsys.readouterr().err
    documents = write_documents(tmp_path / "documents", train=TOPICS[:5])
    assert make_shards(documents, made / "tokenizer", made / "shards") == 2
    assert "their documents is" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 2
    assert "is not empty (it holds 'thesis.txt')" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path):
        assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 2
    assert "another run is writing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train-00001.tar", "validation-00000.tar"])
def test_a_deleted_shard_is_made_again_with_the_same_bytes(made: Path, tmp_path: Path, name: str) -> None:
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    (tmp_path / name).unlink()
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    assert tars(tmp_path) == tars(made / "shards")
    assert ShardIndex.load(tmp_path).splits == ShardIndex.load(made / "shards").splits


def test_an_error_half_way_leaves_a_run_that_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pack.Packer, "take_full", failing_after(12, pack.Packer.take_full))
        assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 130
    assert not (tmp_path / "index.json").exists() and not list(tmp_path.glob(".*.tmp"))
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    assert tars(tmp_path) == tars(made / "shards")


def failing_after(calls: int, function):  # type: ignore[no-untyped-def]
    """`function`, interrupted at a later call as by Ctrl-C."""

    def wrapper(*args):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return function(*args)

    return wrapper


def start(made: Path, out: Path) -> subprocess.Popen:
    stage = ["shards", str(made / "documents"), "--tokenizer", str(made / "tokenizer"), "--out", str(out)]
    code = "import sys; from data_prep import __main__, pack; pack.BYTES_PER_WORKER = 1; sys.exit(__main__.main())"
    command = [sys.executable, "-c", code, *stage, "--shard-megabytes", "1", "--workers", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_shards(out: Path, number: int, process: subprocess.Popen) -> None:
    while len(list(out.glob("*.tar"))) < number and process.poll() is None:
        time.sleep(0.005)


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    for shards_seen in (0, 1, 2):
        process = start(made, tmp_path)
        wait_for_shards(tmp_path, shards_seen, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    assert tars(tmp_path) == tars(made / "shards")


@pytest.mark.slow
def test_a_run_killed_at_many_random_moments_ends_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    moments = np.random.default_rng(0).uniform(0, 3, 12)
    for seconds in moments:
        process = start(made, tmp_path)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    assert tars(tmp_path) == tars(made / "shards")


def test_sigterm_ends_a_run_with_its_own_code(made: Path, tmp_path: Path) -> None:
    process = start(made, tmp_path)
    wait_for_shards(tmp_path, 1, process)
    process.terminate()
    process.communicate()
    assert process.returncode in (143, 0)  # 0: it was done before the signal came
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    assert tars(tmp_path) == tars(made / "shards")


def test_a_journal_cut_short_costs_its_last_line_only(made: Path, tmp_path: Path) -> None:
    process = start(made, tmp_path)
    wait_for_shards(tmp_path, 2, process)
    process.kill()
    process.communicate()
    path = tmp_path / journal.JOURNAL_NAME
    if path.exists():
        path.write_bytes(path.read_bytes()[:-10])
    assert make_shards(made / "documents", made / "tokenizer", tmp_path) == 0
    assert tars(tmp_path) == tars(made / "shards")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    made: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    out = small_disk / "shards"
    assert make_shards(made / "documents", made / "tokenizer", out, "--workers", workers) == 2
    assert "no space left; free some and run the same command" in capsys.readouterr().err
    assert not (out / "index.json").exists() and not list(out.glob(".*.tmp"))
    for path in out.glob("*.tar"):
        assert sha256_of(path) == tars(made / "shards")[path.name]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert make_shards(made / "documents", made / "tokenizer", out) == 0
    assert tars(out) == tars(made / "shards")


def test_a_folder_without_write_permission_is_said(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o555)
    assert make_shards(made / "documents", made / "tokenizer", tmp_path / "shards") == 2
    tmp_path.chmod(0o755)
    assert "Permission denied" in capsys.readouterr().err


def test_a_read_only_disk_is_said(made: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert make_shards(made / "documents", made / "tokenizer", small_disk / "shards") == 2
    assert os.strerror(errno.EROFS) in capsys.readouterr().err


def test_empty_documents_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = write_documents(tmp_path / "no_train", validation=TOPICS[:2])
    assert make_shards(documents, made / "tokenizer", tmp_path / "a") == 2
    assert "has no train documents" in capsys.readouterr().err
    documents = write_documents(tmp_path / "empty_text", train=["text", ""])
    assert make_shards(documents, made / "tokenizer", tmp_path / "b") == 2
    assert "document 'train1' has no text" in capsys.readouterr().err


def test_no_validation_documents_is_an_empty_split(made: Path, tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "documents", train=TOPICS[:3])
    assert make_shards(documents, made / "tokenizer", tmp_path / "shards") == 0
    assert len(ShardReader(tmp_path / "shards", "validation")) == 0


def test_a_damaged_documents_part_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = write_documents(tmp_path / "documents", train=TOPICS[:30])
    path = documents / "train-00001.jsonl.zst"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert make_shards(documents, made / "tokenizer", tmp_path / "shards") == 2
    assert "train-00001.jsonl.zst is damaged" in capsys.readouterr().err
    path.write_bytes(content[:-100])
    assert make_shards(documents, made / "tokenizer", tmp_path / "shards") == 2
    assert "train-00001.jsonl.zst" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [["--sequence-length", "1"], ["--shard-megabytes", "0"], ["--workers", "0"], ["--tokenizer", "absent"]],
)
def test_bad_arguments_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert make_shards(made / "documents", made / "tokenizer", tmp_path, *more) == 2
    assert more[-1] in capsys.readouterr().err
