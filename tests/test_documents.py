"""Cleaning, duplicates and the split; memory, damage, kills and workers."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from corpora import contents, document, documents_in, prose, run_stage, small_disk, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import near_duplicates, parts
from data_prep.__main__ import main
from data_prep.documents import Filter, clean
from data_prep.near_duplicates import Keys, Repeats, make_keys, save_keys, shingle_hashes, signature
from data_prep.parts import Batch, Document, Stage, convert


def run(
    tmp_path: Path, documents: list[Document], *options: str
) -> tuple[dict[str, int], dict[str, int], Path]:
    """(counts, dropped, folder); without validation unless `options` ask for some."""
    source = write_documents(tmp_path / "in", documents)
    out = tmp_path / "out"
    command = ["documents", str(source), "--out", str(out), "--workers", "1", "--validation-share", "0"]
    assert main([*command, *options]) == 0
    counts = json.loads((out / "index.json").read_text())["counts"]
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
    return counts, counts["dropped"], out


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("e\u0301", "\u00e9"),
        ("a\x00b\x1b[0m\x9fc\ufeff", "ab[0mc"),
        ("a\r\nb\rc\u2028d\x0ce\x85f", "a\nb\nc\nd\ne\nf"),
        (" a \t\u00a0\u3000b  \n \n\n\n c ", "a b\n\nc"),
        ("na\u00adive\u200b \u202eevil\u202c", "naive evil"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("\ue123\ud800x\U0010fffe", "x"),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned
    assert clean(cleaned) == cleaned


@settings(deadline=None)  # the machine may be busy
@given(
    st.text(
        alphabet=st.sampled_from("ab \t\n\r\x00\xa0\u2000\u2028e\u0301\u1100\u1161\ufeff\u200c"), max_size=40
    )
)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    assert clean(clean(text)) == clean(text)


def test_every_document_is_kept_or_dropped_for_a_reason(tmp_path: Path) -> None:
    long = prose(3, 2000)
    documents = [
        document(1),
        document(2, "short"),
        document(3, long),
        document(4, prose(1) + "  \n"),  # exact once cleaned
        document(5, prose(5, 400)),
        document(6, prose(5, 400) + " One more sentence."),
        document(7, "\x00" * 500),
    ]
    counts, dropped, out = run(tmp_path, documents, "--max-characters", "9000")
    assert dropped == {"duplicate": 1, "near_duplicate": 1, "too_long": 1, "too_short": 2}
    assert [found["id"] for found in documents_in(out)] == ["test:1", "test:5"]
    assert counts["in"] == 7


def test_an_output_that_fills_slowly_does_not_hold_the_lines_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 100_000)
    stage = Stage("slow", tmp_path / "out", [{"name": "x"}], {}, "a test", outputs=("train", "validation"))

    def fat_and_thin(number: int) -> Batch:
        return Batch(kept={"train": (b"x" * 100_000 + b"\n", 1), "validation": (b"y\n", 1)}, seen=2)

    tracemalloc.start()
    index = convert(stage, range(100), fat_and_thin, 1, 0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index["counts"]["kept"] == 200
    assert peak_bytes < 2_000_000, "of 10 MB written"


def test_of_repeats_the_first_in_input_order_is_kept(tmp_path: Path) -> None:
    texts = [prose(number) for number in (1, 2, 1, 3, 2, 1)]
    _, dropped, out = run(tmp_path, [document(number, text) for number, text in enumerate(texts)])
    assert dropped == {"duplicate": 3}
    assert [found["id"] for found in documents_in(out)] == ["test:0", "test:1", "test:3"]


def test_folders_are_compared_with_each_other(tmp_path: Path) -> None:
    one = write_documents(tmp_path / "one", [document(1), document(2)])
    two = write_documents(tmp_path / "two", [document(3, prose(1)), document(4)])
    out = tmp_path / "out"
    command = ["documents", str(one), str(two), "--out", str(out), "--workers", "1"]
    assert main([*command, "--validation-share", "0"]) == 0
    assert [found["id"] for found in documents_in(out)] == ["test:1", "test:2", "test:4"]


def test_the_split_goes_by_text_alone(tmp_path: Path) -> None:
    documents = [document(number) for number in range(400)]
    _, _, out = run(tmp_path, documents, "--validation-share", "0.2")
    held_out = {found["text"] for found in documents_in(out, "validation")}
    assert 50 < len(held_out) < 110
    assert len(documents_in(out, "train")) + len(held_out) == 400
    random.Random(1).shuffle(documents)
    _, _, again = run(tmp_path / "again", documents, "--validation-share", "0.2")
    assert {found["text"] for found in documents_in(again, "validation")} == held_out


@pytest.mark.parametrize("share", ["1e-9", "0.01", "0.999999999"])
@pytest.mark.parametrize("number", [2, 5, 30])
def test_few_documents_fill_both_splits(tmp_path: Path, number: int, share: str) -> None:
    documents = [document(i) for i in range(number)]
    _, _, out = run(tmp_path, documents, "--validation-share", share)
    train, held_out = (documents_in(out, split) for split in ("train", "validation"))
    assert train and held_out and len(train) + len(held_out) == number
    _, _, again = run(tmp_path / "again", documents[::-1], "--validation-share", share)
    assert {one["id"] for one in documents_in(again, "validation")} == {one["id"] for one in held_out}


def test_a_single_document_cannot_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_documents(tmp_path / "in", [document(1), document(2, prose(1))])
    command = ["documents", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 2
    assert "one document is left" in capsys.readouterr().err
    assert main([*command, "--validation-share", "0"]) == 0, "the folder may be used again"


def test_no_validation_share_gives_no_validation_part(tmp_path: Path) -> None:
    _, _, out = run(tmp_path, [document(1)], "--validation-share", "0")
    assert [path.name for path in sorted(out.iterdir())] == ["index.json", "train-00000.jsonl.zst"]


def altered(words: list[str], share: float, seed: int) -> str:
    dice = random.Random(seed)
    return " ".join(f"new{dice.random()}" if dice.random() < share else word for word in words)


def jaccard(one: str, two: str) -> float:
    shingles = [
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), two.split())
    ]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def test_estimated_similarity_is_near_the_true_one() -> None:
    words = [f"w{random.Random(i).randrange(5000)}" for i in range(3000)]
    whole = " ".join(words)
    for share in (0.0, 0.01, 0.03, 0.1, 0.3):
        other = altered(words, share, 1)
        estimate = (signature(whole) == signature(other)).mean()
        # 120 hashes: a standard deviation of at most 0.046
        assert estimate == pytest.approx(jaccard(whole, other), abs=0.14), share


@pytest.mark.parametrize(("share", "kept"), [(0.005, 1), (0.2, 2)])
def test_alteration_decides_what_is_a_near_duplicate(tmp_path: Path, share: float, kept: int) -> None:
    words = [f"w{random.Random(i).randrange(5000)}" for i in range(2000)]
    counts, _, _ = run(tmp_path, [document(1, " ".join(words)), document(2, altered(words, share, 2))])
    assert counts["kept"] == kept


def test_similarity_one_drops_exact_repeats_only(tmp_path: Path) -> None:
    texts = [prose(1, 400), prose(1, 400) + " More.", prose(1, 400)]
    _, dropped, _ = run(tmp_path, [document(i, text) for i, text in enumerate(texts)], "--similarity", "1")
    assert dropped == {"duplicate": 1}


def test_case_and_line_breaks_do_not_hide_a_near_duplicate(tmp_path: Path) -> None:
    _, dropped, _ = run(tmp_path, [document(1, prose(1)), document(2, prose(1).upper().replace(" ", "\n"))])
    assert dropped == {"near_duplicate": 1}


def test_scripts_without_spaces_are_compared_by_letters(tmp_path: Path) -> None:
    letters = [chr(0x4E00 + random.Random(i).randrange(4000)) for i in range(2000)]
    other = [chr(0x4E00 + random.Random(i + 10_000).randrange(4000)) for i in range(2000)]
    texts = ["".join(letters), "".join(letters[:-9]), "".join(other)]
    _, dropped, _ = run(tmp_path, [document(i, text) for i, text in enumerate(texts)])
    assert dropped == {"near_duplicate": 1}


def test_texts_shorter_than_a_shingle_have_one() -> None:
    assert len(shingle_hashes("only three words")) == 1
    assert len(shingle_hashes("x")) == 1
    assert shingle_hashes("One  two") == shingle_hashes("one two")


def test_a_long_text_is_hashed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(1, 30_000)
    whole = signature(text)
    monkeypatch.setattr(near_duplicates, "PIECE_CHARACTERS", 10_000)
    assert (signature(text) == whole).mean() > 0.95


def test_ranges_of_keys_find_what_one_table_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = np.random.default_rng(0)
    texts = [prose(int(number), 300) for number in dice.integers(0, 60, 200)]
    texts[::3] = [f"{text} changed" for text in texts[::3]]
    counts = []
    for part, start in enumerate(range(0, 200, 50)):
        save_keys(tmp_path, part, make_keys(iter(texts[start : start + 50])))
        counts.append(50)

    def dropped() -> list[int]:
        repeats = Repeats(tmp_path, counts)
        return sorted([*repeats.drop_exact(), *repeats.drop_near(0.8)])

    at_once = dropped()
    assert len(at_once) > 120
    monkeypatch.setattr(near_duplicates, "KEYS_IN_MEMORY", 10)
    monkeypatch.setattr(near_duplicates, "PAIRS_IN_MEMORY", 7)
    assert dropped() == at_once


def test_a_part_without_documents_is_no_obstacle(tmp_path: Path) -> None:
    save_keys(tmp_path, 0, Keys(np.empty(0, np.uint64), np.empty((0, near_duplicates.NUM_HASHES), np.uint32)))
    save_keys(tmp_path, 1, make_keys(iter(["a b c d e f", "a b c d e f"])))
    assert Repeats(tmp_path, [0, 2]).drop_exact().tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_characters": 0}, "got 0 and 0"),
        ({"min_characters": 9, "max_characters": 5}, "got 9 and 5"),
        ({"validation_share": 1.0}, "--validation-share must be in [0, 1), got 1.0"),
        ({"similarity": 0.2}, "--similarity must be in [0.5, 1], got 0.2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Filter(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_unfinished_and_foreign_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_documents(tmp_path / "in", [document(1)])
    (source / "index.json").rename(source / ".progress.json")
    for folder, message in ((source, "is unfinished"), (tmp_path / "none", "holds no documents")):
        assert main(["documents", str(folder), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_folders_without_documents_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blank.txt").write_text(" ")
    assert main(["books", str(tmp_path / "blank.txt"), "--out", str(tmp_path / "in"), "--workers", "1"]) == 0
    assert main(["documents", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "no documents in" in capsys.readouterr().err


def test_documents_that_are_all_dropped_leave_an_index(tmp_path: Path) -> None:
    counts, dropped, out = run(tmp_path, [document(1, "short")])
    assert (counts["kept"], dropped) == (0, {"too_short": 1})
    assert [path.name for path in out.iterdir()] == ["index.json"]


def test_a_damaged_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_documents(tmp_path / "in", [document(number) for number in range(30)])
    (part,) = source.glob("*.zst")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0x55
    part.write_bytes(bytes(content))
    assert main(["documents", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert f"{part} is damaged" in capsys.readouterr().err
    part.write_bytes(bytes(content[:-10]))
    assert main(["documents", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert f"{part}: {len(content)} bytes expected, found {len(content) - 10}" in capsys.readouterr().err


def many(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    source = tmp_path / "texts.jsonl"
    rows = [{"id": str(i), "text": prose(i % 170, 150)} for i in range(200)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_stage("books", source, "--out", folder, "--workers", 1).returncode == 0
    assert len(list(folder.glob("*.zst"))) > 4
    return folder


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = many(tmp_path)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        command = ["documents", folder, "--validation-share", 0.2, "--workers", workers, "--out", out]
        assert run_stage(*command).returncode == 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len(contents(tmp_path / "out1")) > 4


@pytest.mark.parametrize("rename", [2, 7, 25, 27, 30, 33])
def test_killed_anywhere_the_same_command_gives_the_same_bytes(tmp_path: Path, rename: int) -> None:
    command = ["documents", many(tmp_path), "--validation-share", 0.2, "--workers", 1, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_stage(*command, whole).returncode == 0
    assert run_stage(*command, killed, kill_at_rename=rename).returncode == -9
    assert not (killed / "index.json").exists()
    assert run_stage(*command, killed).returncode == 0
    assert contents(killed) == contents(whole)


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(tmp_path: Path) -> None:
    folder = many(tmp_path)
    with small_disk(tmp_path / "disk", 48 << 10) as disk:
        failed = run_stage("documents", folder, "--out", disk / "out", "--workers", 1)
        assert failed.returncode == 2
        assert "No space left on device" in failed.stderr
        assert not [path for path in (disk / "out").rglob("*") if path.name.endswith(".tmp")]
        assert not (disk / "out" / "index.json").exists()
