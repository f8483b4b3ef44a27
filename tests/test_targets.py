"""A folder of targets: tars that webdataset reads, what a kill leaves, what is damaged or of something else."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import zstandard
from tiny import ROOT

from distill.head import Head
from distill.sample_order import Ints
from distill.targets.codecs import Codec, make_codec
from distill.targets.decode import from_bytes
from distill.targets.encode import keep, to_bytes
from distill.targets.header import NAME, BadTargets, Entry, Header, Range, Scorer, load_header
from distill.targets.heads import check_head, head_name, load_head, save_head
from distill.targets.reader import TargetReader
from distill.targets.writer import Journal, compress, finished, member_name, write_shard

VOCABULARY, TOTAL = 64, 50
STAGES = ((0, 2), (20, 8))
TOP = make_codec("top_k", 1.0, k=4)


def header(codec: Codec = TOP, **changes: Any) -> Header:
    made = Header(
        codec, VOCABULARY, {"data": "d" * 64, "seed": 0}, "t" * 64, "fp32", STAGES, TOTAL, 8, (2, 8), {},
        {2: Scorer(("a" * 64,)), 8: Scorer(("b" * 64,))},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def logits_of(sample: int) -> torch.Tensor:
    """Of sample number `sample`, which has sample % 3 rows."""
    return torch.randn(sample % 3, VOCABULARY, generator=torch.Generator().manual_seed(sample))


def payload(sample: int) -> bytes:
    logits = logits_of(sample)
    labels = torch.zeros(len(logits), dtype=torch.int64)
    return to_bytes(keep(TOP, logits, Head(torch.eye(VOCABULARY)), labels, VOCABULARY), VOCABULARY)


def id_of(position: int | Ints) -> Any:
    """The sample at a place of the order, here backwards."""
    return 100 - position


def make(folder: Path, place: Range) -> Entry:
    samples = [int(id_of(position)) for position in range(place.first, place.after)]
    members = [(member_name(0, sample), compress(payload(sample))) for sample in samples]
    return write_shard(
        folder, place, members, sum(s % 3 for s in samples), sum(len(payload(s)) for s in samples)
    )


def read(reader: TargetReader, *positions: int, **changes: Any) -> Any:
    at = np.array(positions)
    asked = {"epochs_B": 0 * at, "ids_B": id_of(at), "counts_B": (id_of(at) % 3).tolist(), **changes}
    return reader.read(at, **asked)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All targets of 50 samples in shards of 8, cut at sample 20."""
    with Journal(tmp_path / "targets", header(), (0, 1)) as journal:
        for place in header().ranges(0, TOTAL):
            journal.add(make(tmp_path / "targets", place))
    return tmp_path / "targets"


# ------------------------------------------------------------------------------------------------ layout


def test_shards_are_cut_by_samples_and_at_stages_whatever_is_asked_for() -> None:
    cuts = [(0, 8), (8, 16), (16, 20), (20, 28), (28, 36), (36, 44), (44, 50)]
    places = list(header().ranges(0, 999))
    assert [(place.first, place.after) for place in places] == cuts
    assert [place.checkpoint for place in places] == [2] * 3 + [8] * 4
    assert all(
        header().range_of(sample) == place for place in places for sample in range(place.first, place.after)
    )
    assert [place.first for place in header().ranges(9, 21)] == [8, 16, 20]
    assert header().range_of(19).name == "targets-000000000016.tar"


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files open
def test_stock_webdataset_reads_every_sample_under_its_key_and_any_zstd_its_content(folder: Path) -> None:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"00000_{id_of(p):012d}" for p in range(TOTAL)]
    for position, sample in enumerate(samples):
        assert zstandard.decompress(sample["targets.zst"]) == payload(id_of(position))
    gc.collect()  # here, not in another test


def test_same_targets_are_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    for place in header().ranges(0, TOTAL):
        make(tmp_path / "again", place)
        assert (tmp_path / "again" / place.name).read_bytes() == (folder / place.name).read_bytes()


def test_targets_come_back_in_any_order_and_from_a_reader_that_was_sent_to_another_process(
    folder: Path,
) -> None:
    reader = TargetReader(folder)
    reader = pickle.loads(pickle.dumps((read(reader, 0), reader)))[1]
    found = read(reader, 49, 3, 20, 19)
    expected = [from_bytes(TOP, payload(id_of(p)), VOCABULARY) for p in (49, 3, 20, 19)]
    assert len(found.ids_NK) == sum(part.num_rows for part in expected)
    np.testing.assert_array_equal(found.ids_NK.numpy().ravel(), np.concatenate([p.ids_M for p in expected]))
    np.testing.assert_array_equal(
        found.probs_NK.numpy().ravel(), np.concatenate([p.probs_M for p in expected])
    )


def test_samples_none_of_whose_rows_count_are_read_as_no_rows(folder: Path) -> None:
    found = read(TargetReader(folder), *[p for p in range(12) if id_of(p) % 3 == 0])
    assert found.ids_NK.shape == (0, 1) and found.gold_N.shape == (0,)


def test_head_comes_back_to_the_bit_with_its_softcap(tmp_path: Path) -> None:
    for head in (
        Head(torch.randn(9, 4).bfloat16(), torch.randn(9).bfloat16(), 30.0),
        Head(torch.randn(9, 4)),
    ):
        save_head(tmp_path, 8, header().checkpoints[8], head)
        found = load_head(header(url=str(tmp_path)), 8, torch.device("cpu"))
        assert torch.equal(found.weight_VD, head.weight_VD) and found.softcap == head.softcap
        assert (found.bias_V is None) == (head.bias_V is None)


# ------------------------------------------------------------------------------------------------ kills and jobs


def test_line_that_a_kill_cut_off_is_no_shard_and_the_next_job_writes_over_it(folder: Path) -> None:
    journal = folder / "part-0-of-1.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    assert TargetReader(folder).first_missing(0, TOTAL) == header().range_of(44)
    assert 44 not in finished(folder)
    with Journal(folder, header(), (0, 1)) as again:
        again.add(make(folder, header().range_of(44)))
    assert journal.read_bytes() == whole


def test_shard_that_somebody_deleted_is_to_be_made_again(folder: Path) -> None:
    (folder / header().range_of(8).name).unlink()
    assert 8 not in finished(folder) and 0 in finished(folder)


def test_shard_made_twice_with_other_bytes_is_good_in_either(folder: Path) -> None:
    """Two jobs of other partitions may meet at one shard, and two devices round differently."""
    place = header().range_of(0)
    members = [(member_name(0, int(id_of(p))), compress(payload(id_of(p)))) for p in range(8)]
    members[0] = (
        members[0][0],
        zstandard.ZstdCompressor(level=1, write_checksum=True).compress(payload(100)),
    )
    with Journal(folder, header(), (1, 3)) as journal:
        journal.add(write_shard(folder, place, members, 0, 0))
    assert len(read(TargetReader(folder), 0).ids_NK) == 100 % 3
    assert finished(folder).keys() >= {0}


def test_two_jobs_of_one_part_are_refused(folder: Path) -> None:
    script = f"""if True:
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from test_targets import header, Journal, BadTargets
        try:
            Journal(Path({str(folder)!r}), header(), (0, 1))
        except BadTargets as error:
            print(error)
    """
    with Journal(folder, header(), (0, 1)):
        said = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
    assert "part-0-of-1.jsonl is in use: another job scores this part" in said


def test_file_system_without_locks_is_not_told_as_another_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(OSError, match="cannot lock .*part-0-of-1.jsonl: No locks available; give --out"):
        Journal(folder, header(), (0, 1))


def test_job_that_begins_while_another_one_makes_the_folder_joins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, others = Path.iterdir, list[Journal]()

    def late(folder: Path) -> Iterator[Path]:
        """Before this job has the names, another one writes its header and journal."""
        monkeypatch.setattr(Path, "iterdir", plain)
        others.append(Journal(folder, header(), (1, 2)))
        return plain(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    with Journal(tmp_path, header(), (0, 2)):
        others[0].__exit__(None, None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        NAME,
        "part-0-of-2.jsonl",
        "part-1-of-2.jsonl",
    ]


def test_folder_of_something_else_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(BadTargets, match=r"is not empty \(it holds 'thesis.tex'\)"):
        Journal(tmp_path / "full", header(), (0, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": make_codec("top_k", 1.0, k=5)}, "their codec is top_k k=4, now top_k k=5"),
        ({"samples": {"data": "d" * 64, "seed": 1}}, "their samples seed is 0, now 1"),
        ({"stages": ((0, 2), (24, 8))}, r"their stages is \(\(0, 2\), \(20, 8\)\), now"),
        ({"checkpoints": {2: Scorer(("a" * 64,)), 8: Scorer(("c" * 64,))}}, "their checkpoints 8 is"),
        ({"samples_per_shard": 16}, "their samples_per_shard is 8, now 16"),
    ],
)
def test_folder_of_other_targets_is_not_written_to(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadTargets, match=f"holds other targets: {said}"):
        Journal(folder, header(**changes), (0, 1))
    Journal(folder, header(command="another"), (1, 2)).__exit__(None, None, None)


# ------------------------------------------------------------------------------------------------ bad input


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "targets-000000000008.tar is missing: run the same `distill score` command again"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-512]),
            "bytes, .* expected: delete it and run the same",
        ),
        (flip, "has sha256 [0-9a-f]{12}, its journal says [0-9a-f]{12}: delete it and run the same"),
    ],
)
def test_damaged_shard_is_refused_with_its_name(
    folder: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(folder / header().range_of(8).name)
    reader = TargetReader(folder)
    assert len(read(reader, 0).ids_NK) == 100 % 3
    with pytest.raises(BadTargets, match=said):
        read(reader, 8)
    if damage is not flip:  # seen without reading it
        with pytest.raises(BadTargets, match=said):
            reader.refuse_damaged(0, TOTAL)
    reader.refuse_damaged(16, TOTAL)


def test_samples_that_are_not_scored_yet_are_refused_and_come_with_the_next_look(folder: Path) -> None:
    journal = folder / "part-0-of-1.jsonl"
    whole = journal.read_text()
    journal.write_text("".join(line for line in whole.splitlines(True) if '"first": 8,' not in line))
    reader = TargetReader(folder)
    assert reader.first_missing(0, 8) is None
    assert reader.first_missing(0, TOTAL) == header().range_of(8)
    with pytest.raises(BadTargets, match="has no targets of samples 8 to 15 yet"):
        read(reader, 9)
    journal.write_text(whole)
    assert reader.first_missing(0, TOTAL) is None
    assert len(read(reader, 9).ids_NK) == 91 % 3


def test_other_sample_epoch_or_number_of_rows_than_was_scored_is_refused(folder: Path) -> None:
    reader = TargetReader(folder)
    with pytest.raises(BadTargets, match=r"has 00000_000000000099.* this run reads 00000_000000000005"):
        read(reader, 1, ids_B=np.array([5]))
    with pytest.raises(BadTargets, match="this run reads 00001_000000000099"):
        read(reader, 1, epochs_B=np.array([1]))
    with pytest.raises(BadTargets, match="has targets of 2 rows of sample 98, of which 3 count"):
        read(reader, 2, counts_B=[3])


def test_folder_without_targets_says_how_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(
        BadTargets, match=f"targets are made by `distill score CONFIG --out {re.escape(str(tmp_path))}`"
    ):
        TargetReader(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema": 0}', '{"schema": 1}', '{"schema": 1, "codec": {"nme": 1}}']
)
def test_header_that_is_none_is_refused_by_its_name(folder: Path, content: str) -> None:
    (folder / NAME).write_text(content)
    with pytest.raises(ValueError, match=NAME):
        load_header(folder)


def test_journal_that_is_none_is_refused_by_its_name(folder: Path) -> None:
    (folder / "part-1-of-9.jsonl").write_text(json.dumps({"first": 0}) + "\n")
    with pytest.raises(BadTargets, match="part-1-of-9.jsonl holds the line"):
        TargetReader(folder)


def test_damaged_or_missing_head_is_refused(tmp_path: Path) -> None:
    told, path = header(url=str(tmp_path)), tmp_path / head_name(8)
    with pytest.raises(BadTargets, match="head-00000008.safetensors can't be read"):
        load_head(told, 8, torch.device("cpu"))
    save_head(tmp_path, 8, told.checkpoints[8], Head(torch.randn(9, 4)))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadTargets, match="holds tensors of sha256"):
        load_head(told, 8, torch.device("cpu"))
    check_head(told, 8)  # reads no tensors, but sees a file that was cut off
    path.write_bytes(content[:-1])
    with pytest.raises(BadTargets, match="head-00000008.safetensors can't be read"):
        check_head(told, 8)


@pytest.mark.parametrize("owner", [(2, "a"), (8, "c")], ids=["another step", "another trajectory"])
def test_head_of_another_teacher_is_refused_under_any_name(owner: tuple[int, str], tmp_path: Path) -> None:
    step, letter = owner
    save_head(tmp_path, step, Scorer((letter * 64,)), Head(torch.randn(9, 4)))
    (tmp_path / head_name(step)).rename(tmp_path / head_name(8))
    said = f"is the head of teacher step {step} with weights of sha256 {letter * 12}, .* by step 8 .* sha256 bbbbbbbbbbbb"
    for look in (check_head, partial(load_head, device=torch.device("cpu"))):
        with pytest.raises(BadTargets, match=said):
            look(header(url=str(tmp_path)), 8)
