"""Books and tables to documents: Gutenberg's frame, wrapped lines, encodings, rows, damage, kills, workers."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from corpora import contents, documents_in, prose, run_stage
from pyarrow import parquet

from data_prep import books
from data_prep.__main__ import main
from data_prep.etexts import NotText, decode, gutenberg_parts, unwrapped
from data_prep.parts import Document

PROSE = (
    "It is a truth universally acknowledged, that a single man in possession\n"
    "of a good fortune, must be in want of a wife. However little known the\n"
    "feelings or views of such a man may be on his first entering a\n"
    "neighbourhood, this truth is so well fixed.\n"
)
VERSE = (
    "Shall I compare thee to a summer's day?\n"
    "Thou art more lovely and more temperate:\n"
    "Rough winds do shake the darling buds of May,\n"
    "And summer's lease hath all too short a date.\n"
)
GUTENBERG = (
    "The Project Gutenberg eBook of Pride and\n    Prejudice\n\nTitle: Pride and\n    Prejudice\n\n"
    "Release date: June 1, 1998 [eBook #1342]\n\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK PRIDE AND PREJUDICE ***\n\n"
    "Produced by volunteers\nand others\n\n\n"
    f"PRIDE AND PREJUDICE\n\n{PROSE}\n{VERSE}\n"
    "*** END OF THE PROJECT GUTENBERG EBOOK PRIDE AND PREJUDICE ***\n\nlicence licence licence\n"
)


def convert(
    tmp_path: Path, *paths: Path, options: tuple[str, ...] = ()
) -> tuple[list[Document], dict[str, int]]:
    """(documents, counts by reason of dropping)"""
    out = tmp_path / "out"
    assert main(["books", *map(str, paths), "--out", str(out), "--workers", "1", *options]) == 0
    counts = json.loads((out / "index.json").read_text())["counts"]
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values())
    return documents_in(out), counts["dropped"]


def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert main(["books", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def test_a_gutenberg_book_loses_its_frame_and_its_wrapping(tmp_path: Path) -> None:
    (tmp_path / "pg1342.txt").write_text(
        "\ufeff" + GUTENBERG.replace("\n", "\r\n"), encoding="utf-8", newline=""
    )
    (book,), _ = convert(tmp_path, tmp_path / "pg1342.txt")
    assert (book["id"], book["source"], book["title"]) == (
        "gutenberg:1342",
        "gutenberg",
        "Pride and Prejudice",
    )
    assert book["text"].split("\n\n") == [
        "PRIDE AND PREJUDICE",
        PROSE.strip().replace("\n", " "),
        VERSE.strip(),
    ]


@pytest.mark.parametrize(
    ("head", "foot"),
    [
        ("***START OF THE PROJECT GUTENBERG EBOOK X***", "***END OF THE PROJECT GUTENBERG EBOOK X***"),
        (
            "*** START OF THIS PROJECT GUTENBERG EBOOK A LONG\nTITLE ***",
            "End of the Project Gutenberg EBook of X",
        ),
        (
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
            "End of Project Gutenberg's Etext",
        ),
        ("some etext without a start mark", "End of The Project Gutenberg Etext of X"),
    ],
)
def test_frames_of_all_ages_are_cut(head: str, foot: str) -> None:
    body = "The story.\n\n" * 100 + "The end."
    parts = gutenberg_parts(f"Title: X\n\n{head}\n\n{body}\n\n{foot}\nlicence")
    assert parts is not None
    assert parts[2].endswith("The end.")
    assert "START" not in parts[2] and "SMALL PRINT" not in parts[2]


def test_a_sentence_about_the_end_of_project_gutenberg_stays_where_a_mark_follows() -> None:
    story = "The story.\n\n" * 100
    body = f"{story}End of Project Gutenberg, he read.\n\n{story}The end."
    mark = "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
    for foot in (mark, f"End of the Project Gutenberg EBook of X,\nby Y\n\n\n{mark}"):
        parts = gutenberg_parts(
            f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n{body}\n\n{foot}\nlicence"
        )
        assert parts is not None and parts[2] == body


def test_files_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "a.txt").write_text(prose(number))
    (folders[0] / "a.txt (2)").mkdir()  # a name that is taken
    (folders[0] / "a.txt (2)" / "b.txt").write_text(prose(9))
    found, _ = convert(tmp_path, *folders)
    assert [one["id"] for one in found] == [
        "text:a.txt", "text:a.txt (2)/b.txt", "text:a.txt (2)", "text:a.txt (3)",
    ]  # fmt: skip
    assert books._distinct(["a", "a (2)", "a", "a", "b"]) == ["a", "a (2)", "a (3)", "a (4)", "b"]


def test_a_book_about_gutenberg_is_no_gutenberg_file() -> None:
    assert gutenberg_parts("Project Gutenberg was founded in 1971.\n" * 50) is None


def test_wrapped_lines_are_joined_only_in_wrapped_prose() -> None:
    one_line = PROSE.strip().replace("\n", " ")
    assert unwrapped(PROSE.strip()) == one_line
    assert unwrapped(f"{PROSE}\n{VERSE}").endswith(VERSE)
    listing = "Apples and pears\nPlums\nQuinces\n"
    assert unwrapped(f"{PROSE}\n{listing}").endswith(listing)
    indented = PROSE.replace("\n", "\n    ").strip()
    assert unwrapped(f"{PROSE}\n{indented}").endswith(indented)
    long_lines = f"{one_line}\n{one_line}\n{one_line}\n{one_line}\n"
    assert unwrapped(long_lines) == long_lines


FRENCH = "Ça ira très bien, l’été à la forêt où Noël se fête dès août. " * 5


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (FRENCH.encode(), FRENCH),
        (FRENCH.encode("utf-8-sig"), FRENCH),
        (FRENCH.encode("utf-16"), FRENCH),
        (
            b"Character set encoding: ISO-8859-1\n\nCaf\xe9 \x93x\x94",
            "Character set encoding: ISO-8859-1\n\nCafé “x”",
        ),
        (
            b"Character set encoding: ASCII\n\n" + "Überall grüßt schön".encode("cp1252"),
            "Überall grüßt schön",
        ),
        ("Широкая электрификация южных губерний даст мощный толчок.\n".encode("koi8-r") * 4, "Широкая"),
    ],
)
def test_encodings_are_found(content: bytes, text: str) -> None:
    assert text in decode(content)[0]


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x00\x00", b"\xff\xfea\x00b", b"text\0text"])
def test_binary_is_no_text(content: bytes) -> None:
    with pytest.raises(NotText):
        decode(content)


def test_every_file_is_kept_or_dropped_for_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "MAX_TEXT_BYTES", 5000)
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "spaces.txt").write_bytes(b" \n\n ")
    (folder / "photo.txt").write_bytes(b"\x89PNG\0")
    (folder / "huge.txt").write_bytes(b"x" * 5001)
    (folder / "deep" / "the_good.TXT").write_text(prose(1))
    (folder / "notes.md").write_text("not looked at")
    found, dropped = convert(tmp_path, folder)
    assert dropped == {"no_text": 2, "not_text": 1, "too_large": 1}
    assert found == [
        {"id": "text:deep/the_good.TXT", "source": "text", "title": "the good", "text": prose(1)}
    ]


ROWS = [{"id": f"r{i}", "title": f"T{i}", "text": prose(i), "body": f"Body {i}"} for i in range(9)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet_bytes(tmp_path: Path) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "made.pq", row_group_size=4)
    return (tmp_path / "made.pq").read_bytes()


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.jsonl.zst", "t.parquet"])
def test_tables_give_a_document_a_row(tmp_path: Path, name: str) -> None:
    packed = {
        "t.jsonl": LINES.rstrip(b"\n"),
        "t.jsonl.gz": gzip.compress(LINES),
        "t.jsonl.zst": zstandard.compress(LINES[:500]) + zstandard.compress(LINES[500:]),
        "t.parquet": parquet_bytes(tmp_path),
    }
    (tmp_path / name).write_bytes(packed[name])
    found, _ = convert(tmp_path, tmp_path / name)
    assert [(one["id"], one["title"], one["text"]) for one in found] == [
        (row["id"], row["title"], row["text"]) for row in ROWS
    ]
    assert found[0]["source"] == name


def test_the_text_column_may_have_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_bytes(LINES)
    (tmp_path / "p.parquet").write_bytes(parquet_bytes(tmp_path))
    found, _ = convert(
        tmp_path, tmp_path / "t.jsonl", tmp_path / "p.parquet", options=("--text-column", "body")
    )
    assert [one["text"] for one in found] == [row["body"] for row in ROWS] * 2
    for name in ("t.jsonl", "p.parquet"):
        out = str(tmp_path / name[0])
        assert main(["books", str(tmp_path / name), "--out", out, "--text-column", "story"]) == 2
        assert "has no column 'story', only ['body', 'id', 'text', 'title']" in capsys.readouterr().err


def test_rows_that_are_not_utf8_or_empty_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(
        b'{"text": "caf\xe9"}\n{"text": ""}\n{"text": null}\n\n{"text": "good"}\n'
    )
    found, dropped = convert(tmp_path, tmp_path / "t.jsonl")
    assert dropped == {"invalid_utf8": 1, "no_text": 2}
    assert [(one["id"], one["text"]) for one in found] == [("t.jsonl:3", "good")]


def test_parquet_strings_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    binary = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "t.parquet")
    found, dropped = convert(tmp_path, tmp_path / "t.parquet")
    assert (len(found), dropped) == (1, {"invalid_utf8": 1})


def test_a_lone_surrogate_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud800b"}\n')
    found, _ = convert(tmp_path, tmp_path / "t.jsonl")
    assert found[0]["text"] == "ab"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', "t.jsonl row 2 is not JSON"),
        ("t.jsonl", b"[1]\n", "t.jsonl row 1 is a JSON list, an object"),
        ("t.jsonl", b"", "no documents in t.jsonl"),
        ("t.jsonl.gz", gzip.compress(LINES)[:-9], "t.jsonl.gz is damaged before byte"),
        ("t.jsonl.gz", b"no gzip", "t.jsonl.gz is damaged before byte"),
        ("t.jsonl.zst", zstandard.compress(LINES)[:-9], "it is cut off; get it again"),
        ("t.jsonl.zst", b"no zstd at all", "t.jsonl.zst is damaged before byte"),
        ("t.parquet", b"PAR1 no parquet", "t.parquet is no readable Parquet file"),
        ("t.docx", b"x", "t.docx is none of .txt, .text, .jsonl"),
    ],
)
def test_damaged_tables_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path, capsys, tmp_path / name)


def test_missing_paths_and_empty_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none.txt does not exist" in refusal(tmp_path, capsys, tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    assert "empty holds none of .txt" in refusal(tmp_path, capsys, tmp_path / "empty")


def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(prose(number, 300))
    (folder / "rows.jsonl").write_bytes(LINES * 10)
    return folder


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = corpus(tmp_path)
    for workers in (1, 2):
        done = run_stage("books", folder, "--out", tmp_path / f"out{workers}", "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len(contents(tmp_path / "out1")) > 4


@pytest.mark.parametrize("rename", [2, 3, 8])
def test_killed_anywhere_the_same_command_gives_the_same_bytes(tmp_path: Path, rename: int) -> None:
    command = ["books", corpus(tmp_path), "--workers", 1, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_stage(*command, whole).returncode == 0
    assert run_stage(*command, killed, kill_at_rename=rename).returncode == -9
    assert run_stage(*command, killed).returncode == 0
    assert contents(killed) == contents(whole)
