"""The README is a contract:

every command in it runs here, on small models, in the order in which a stranger would type them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.models import build_model
from tests.corpora import multistream, page
from tests.shard_folders import TOPICS

ROOT = Path(__file__).parent.parent
TINY = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
SMALL = (
    "steps=4",
    "batch_size=4",
    "micro_batch_size=0",
    "save.every=2",
    "log.eval_every=2",
    "log.eval_samples=8",
    f"model.overrides={TINY}",
)
TEACHER = ("save.trajectory_every=2", "save.trajectory_first=0")


def readme_commands() -> Iterator[str]:
    """Commands of the README's bash blocks, without comments, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.sub(r"(^|\s)#.*", "", line).strip():
                yield " ".join(command.split())


def small(command: str) -> list[str]:
    """The command with the sizes of a test:

    README's paths moved to the test's folder, tiny models, two ranks instead of eight.
    """
    command = re.sub(r"(^|[ =])/(data|runs)(?=[/ ]|$)", r"\1cluster/\2", command)
    command = command.replace("distill/configs", f"{ROOT}/distill/configs").replace(
        "--num_gpus 8", "--num_gpus 2"
    )
    words = command.split()
    if "train" in words or "slurm/train.sbatch" in words:
        words += SMALL + (TEACHER if "teacher.yaml" in command else ())
        # The paper's 15 stages need a teacher that long.
        words += ("schedule.num_stages=0",) if "progressive.yaml" in command else ()
    if "score" in words:  # its options come after all settings
        at = words.index("--out")
        words[at:at] = SMALL
    if words[0] == "python":
        words[0] = sys.executable
    if (
        words[0] == "sbatch"
    ):  # the queue is a matter of tests with a real cluster; here the script itself runs
        script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        words = ["bash", f"{ROOT}/{words[script]}", *words[script + 1 :]]
    return words


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README supposes a user to have: texts, dumps, a public trajectory."""
    home = tmp_path_factory.mktemp("stranger")
    texts = home / "my_texts"
    texts.mkdir()
    for i, text in enumerate(TOPICS[:60]):
        (texts / f"{i}.txt").write_text(text)
    shutil.copytree(texts, home / "cluster" / "data" / "gutenberg")
    for step in (1000, 2000):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = build_model(
            "clm", "gpt_neox", sizes, vocab_size=1024, sequence_length=64, special_ids={}, seed=step
        )
        model.to(torch.bfloat16).save_pretrained(home / "cluster" / "data" / "pythia-410m" / f"step{step}")
    (home / "bin").mkdir()
    options = 'while [ "${1#-}" != "$1" ]; do case $1 in --export=ALL,*) export "${1#--export=ALL,}";; esac; shift; done'
    stand_ins = {
        "srun": f'{options}; exec "$@"',
        "sbatch": f'{options}; export SLURM_ARRAY_TASK_ID=0; bash "$@" >&2; echo 2',  # runs what it should queue
    }
    for name, body in stand_ins.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (home / "bin" / name).chmod(0o755)
    return home


def environment(home: Path) -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_PARTITION": "main",
        "SLURM_SUBMIT_DIR": str(home),
        "DISTILL_HOME": str(home),
    }
    path = f"{home / 'bin'}:{scripts}:{os.environ['PATH']}"
    return {
        **os.environ,
        **slurm,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VOCAB_SIZE": "600",
        "SEQUENCE_LENGTH": "64",
    }


def test_every_command_of_the_readme_runs(stranger: Path) -> None:
    shutil.copytree(ROOT / "slurm", stranger / "slurm")
    (stranger / ".venv" / "bin").mkdir(parents=True)
    (stranger / ".venv" / "bin" / "activate").write_text("")
    (stranger / "cluster" / "data" / "enwiki-pages-articles-multistream.xml.bz2").write_bytes(
        multistream([page(i) for i in range(40)])
    )
    ran = []
    for command in readme_commands():
        if command.startswith(("make ", "source ")):  # make is the business of test_packaging
            continue
        done = subprocess.run(
            small(command),
            cwd=stranger,
            env=environment(stranger),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        ran.append(command)
    assert len(ran) >= 12
    assert (stranger / "cluster" / "runs" / "bert_student" / "result.json").exists()
    assert (stranger / "student" / "model.safetensors").exists()
    assert (stranger / "runs" / "from_targets" / "result.json").exists()
