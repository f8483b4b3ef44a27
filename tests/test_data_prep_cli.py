"""The command line of data_prep: help, exit codes, signals, what is imported."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from corpora import ROOT, STAGE, contents, dump, page, run_stage

from data_prep.__main__ import STAGES, main
from tests.shard_folders import TOPICS, held, write_documents


def test_help_lists_every_stage_and_imports_none() -> None:
    code = (
        "import sys; from data_prep.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('numpy', 'torch', 'mwparserfromhell', 'rensa') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for stage in STAGES:
        assert f"  {stage} " in done.stdout or f"  {stage}\n" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help_with_an_example(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    assert ended.value.code == 0
    assert f"python -m data_prep {stage}" in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize(
    "arguments", [[], ["shard"], ["wikipedia"], ["books", "x", "--out", "y", "--wrokers", "2"]]
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_errors_are_one_line_without_traceback(tmp_path: Path) -> None:
    done = run_stage("wikipedia", tmp_path / "none.bz2", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "none.bz2" in done.stderr


def test_workers_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.xml"
    source.write_bytes(dump([page(1)]))
    assert main(["wikipedia", str(source), "--out", str(tmp_path / "out"), "--workers", "0"]) == 2
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["wikipedia", "books", "documents", "tokenizer"])
def test_a_folder_that_another_run_writes_to_is_refused_until_that_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    (tmp_path / "a.xml").write_bytes(dump([page(1), page(2)]))
    (tmp_path / "a.txt").write_text("One text.")
    texts = write_documents(tmp_path / "texts", train=TOPICS[:60])
    source = {"wikipedia": tmp_path / "a.xml", "books": tmp_path / "a.txt"}.get(stage, texts)
    command = [stage, str(source), "--out", str(tmp_path / "out")]
    command += ["--vocab-size", "500"] if stage == "tokenizer" else ["--workers", "1"]
    with held(tmp_path / "out") as other:
        assert main(command) == 2
        assert f"another run is writing to {tmp_path / 'out'}" in capsys.readouterr().err
        other.kill()
        other.wait()
        assert (tmp_path / "out" / ".lock").exists()
        assert main(command) == 0
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_finished_folder_closed_to_writing_may_be_asked_for_again() -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to other users
        source, out = Path(folder, "a.txt"), Path(folder, "out")
        source.write_text("One text.")
        command = ("books", source, "--workers", 1, "--out", out)
        assert run_stage(*command).returncode == 0
        for path in (out, Path(folder)):
            path.chmod(0o555)
        done = run_stage(*command, as_user=65534 if os.geteuid() == 0 else 0)
        for path in (out, Path(folder)):
            path.chmod(0o755)
        assert done.returncode == 0, done.stderr


def long_work(tmp_path: Path, workers: int) -> tuple[list[str], Path]:
    """(a command that writes many small parts for some seconds, the folder it writes to)"""
    source, out = tmp_path / "a.xml", tmp_path / "out"
    source.write_bytes(dump(page(number, "''a'' [[b]] " * 1000) for number in range(1000)))
    arguments = ["wikipedia", str(source), "--out", str(out), "--workers", str(workers)]
    return [sys.executable, "-c", STAGE, "0", "0", *arguments], out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [1, 2])
def test_signals_end_with_their_code_and_leave_a_state_to_go_on_from(
    tmp_path: Path, number: signal.Signals, code: int, workers: int
) -> None:
    command, out = long_work(tmp_path, workers)
    # a session of its own, so that Ctrl-C reaches the whole group, as on a terminal
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not list(out.glob("*.zst")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code, errors
    assert b"Traceback" not in errors
    assert ".progress.json" in contents(out) and "index.json" not in contents(out)
    assert not [name for name in contents(out) if name.endswith(".tmp")]


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    command, out = long_work(tmp_path, workers=2)
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not list(out.glob("*.zst")):
            assert process.poll() is None
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
