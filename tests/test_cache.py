"""The cache of checkpoints on a node's disk: its budget, who has to go, other processes, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import ROOT

from distill.trajectory.cache import Cache

SIZE = 1000


def fill(cache: Cache, key: str, upcoming: list[str] | None = None, size: int = SIZE) -> None:
    held = cache.begin(key, size, upcoming or [])
    (held.folder / "weights").write_bytes(os.urandom(size))
    cache.publish(held, key).release()


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def used_at(cache: Cache, key: str, seconds: float) -> None:
    os.utime(cache.folder / key / ".lock", (seconds, seconds))


@contextmanager
def other_process(folder: Path, doing: str) -> Iterator[subprocess.Popen[str]]:
    """Another process with a `cache` there that does this, says so, and stays until it is killed."""
    script = (
        "import sys, time; from pathlib import Path; from distill.trajectory.cache import Cache\n"
        f"cache = Cache(Path(sys.argv[1]), {10 * SIZE})\n{doing}\nprint('done', flush=True)\ntime.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_entry_is_there_once_published_and_not_before(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    held = cache.begin("a", SIZE, [])
    (held.folder / "weights").write_bytes(b"1" * SIZE)
    assert cache.hold("a") is None
    published = cache.publish(held, "a")
    assert (published.folder, (tmp_path / "a" / "weights").read_bytes()) == (tmp_path / "a", b"1" * SIZE)
    published.release()
    found = cache.hold("a")
    assert found is not None
    found.release()


def test_discarded_entry_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    held = cache.begin("a", SIZE, [])
    (held.folder / "weights").write_bytes(b"1")
    held.discard()
    assert entries(tmp_path) == []


def test_what_the_schedule_needs_last_goes_first_and_before_that_what_it_never_needs(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 4 * SIZE)
    for i, key in enumerate(("soon", "never", "late", "never-older")):
        fill(cache, key)
        used_at(cache, key, 1000 + i)
    used_at(cache, "never-older", 1)
    left = []
    for new in ("1", "2", "3"):
        fill(cache, new, ["1", "2", "3", "soon", "late"])
        left.append([key for key in entries(tmp_path) if key not in "123"])
    assert left == [["late", "never", "soon"], ["late", "soon"], ["soon"]]


def test_room_that_other_entries_need_is_not_taken(tmp_path: Path) -> None:
    """Half-written entries of other processes count too."""
    cache = Cache(tmp_path, 2 * SIZE + SIZE // 2)
    with other_process(
        tmp_path, f"held = cache.begin('b', 1, []); (held.folder / 'w').write_bytes(b'1' * {SIZE})"
    ):
        fill(cache, "a")
        fill(cache, "c")
        assert "a" not in entries(tmp_path)
        with pytest.raises(OSError, match=r"does not fit a budget of 0\.000 GB, .*raise teacher\.cache_gb"):
            cache.begin("d", 2 * SIZE, [])


def test_too_large_an_entry_names_the_budget_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a teacher of 3\.000 GB does not fit a budget of 1\.000 GB"):
        Cache(tmp_path, 10**9).begin("a", 3 * 10**9, [])
    assert entries(tmp_path) == []


def test_budget_is_half_of_what_is_free_unless_given(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert Cache(tmp_path).budget == pytest.approx(free / 2, rel=0.1)


def test_entry_that_another_process_holds_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2 * SIZE)
    fill(cache, "a")
    fill(cache, "b")
    used_at(cache, "a", 1)
    with other_process(tmp_path, "held = cache.hold('a'); assert held"):
        assert not cache.remove("a")
        fill(cache, "c")
        assert entries(tmp_path) == ["a", "c"]
    assert cache.remove("a")  # its holder is dead


def test_entry_read_by_one_process_can_be_read_by_another(tmp_path: Path) -> None:
    """Also by the one that has just filled it."""
    with other_process(tmp_path, "held = cache.publish(cache.begin('a', 1, []), 'a')"):
        found = Cache(tmp_path, SIZE).hold("a")
        assert found is not None
        found.release()


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    writes = "held = cache.begin('a', 1, []); (held.folder / 'w').write_bytes(b'1')"
    with other_process(tmp_path, writes) as process:
        fill(Cache(tmp_path, 10 * SIZE), "b")
        assert len(entries(tmp_path)) == 2  # it is at work
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(entries(tmp_path)) == 2
        fill(Cache(tmp_path, 10 * SIZE), "c")
        assert entries(tmp_path) == ["b", "c"]


def test_of_two_processes_that_fetch_the_same_the_second_takes_the_first_ones(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10 * SIZE)
    held = cache.begin("a", SIZE, [])
    (held.folder / "weights").write_bytes(b"mine")
    faster = (
        "h = cache.begin('a', 1, []); (h.folder / 'weights').write_bytes(b'theirs'); cache.publish(h, 'a')"
    )
    with other_process(tmp_path, faster):
        assert (cache.publish(held, "a").folder / "weights").read_bytes() == b"theirs"
        assert entries(tmp_path) == ["a"]
