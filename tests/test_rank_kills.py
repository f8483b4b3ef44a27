"""One of two ranks is killed at random moments, again and again: the run ends as if nobody had, and nothing is left."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from tiny import Started, distill_on_ranks, rank_environs, rows, settings, weights

STUDENT = {
    "steps": 600,
    "micro_batch_size": 2,
    "save__every": 7,
    "data__num_workers": 1,
    "objective__weights": {"forward_kl": 1.0, "hard": 0.5},
    "schedule__kind": "explicit",
    "schedule__stages": [[0, 2], [90, 8], [177, 4], [300, 24]],
}
KILLS = 20


def saved(run_dir: Path) -> set[Path]:
    return set((run_dir / "checkpoints").glob("step_????????/state.json"))


def one_rank_killed(arguments: list[str], folder: Path, moments: random.Random) -> None:
    """Start two ranks, kill one of them and then the other, as launchers do.

    Twice in three some time after they have got further, or twenty kills would never get anywhere; else at any time, also
    while they start or take up a checkpoint.
    """
    number = len(list(folder.glob("killed-*"))) // 2
    ranks = [
        Started(arguments, folder / f"killed-{number}-{r}.txt", environ)
        for r, environ in enumerate(rank_environs(2))
    ]
    before = saved(folder / "run")
    try:
        if number % 3:
            while all(r.is_alive() for r in ranks) and saved(folder / "run") == before:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.5))
        else:
            time.sleep(moments.uniform(0, 4))
        ranks[moments.randrange(2)].kill()
        time.sleep(moments.uniform(0, 0.1))
    finally:
        for rank in ranks:
            rank.kill()
    for rank in ranks:
        rank.wait()


def left_in_shared_memory() -> set[str]:
    """Blocks of shared memory whose process is gone."""
    found = {p.name for p in Path("/dev/shm").iterdir()}
    owners = {name: re.match(r"torch_(\d+)_|deepspeed_\w+_(\d+)", name) for name in found}
    return {
        name for name, match in owners.items() if match and not Path("/proc", match[1] or match[2]).exists()
    }


@pytest.mark.slow
@pytest.mark.dist
def test_random_rank_killed_at_random_moments_changes_nothing_and_leaves_nothing(
    shards: Path, teacher_run: Path, tmp_path: Path
) -> None:
    moments = random.Random(0)
    left_before = left_in_shared_memory()

    def arguments(run_dir: Path) -> list[str]:
        trajectory = str(teacher_run / "trajectory")
        return ["train", *settings(shards, run_dir, teacher__trajectory=trajectory, **STUDENT)]

    (tmp_path / "calm").mkdir()
    for ended in distill_on_ranks([*arguments(tmp_path / "calm" / "run")], tmp_path / "calm", 2):
        ended.ok()
    for _ in range(KILLS):
        one_rank_killed(arguments(tmp_path / "run"), tmp_path, moments)
        assert not (tmp_path / "run" / "result.json").exists()
    for ended in distill_on_ranks(arguments(tmp_path / "run"), tmp_path, 2):
        ended.ok()
    assert rows(tmp_path / "run") == rows(tmp_path / "calm" / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "calm" / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert left_in_shared_memory() <= left_before
