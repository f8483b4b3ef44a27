"""Small real things for the tests of `distill`: shards to learn from, a config, runs in processes, kills."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shards import TokenizerInfo, write_shards
from distill.config import Config
from distill.config_reader import load_config
from distill.metrics import CLOCK, METRICS, read_rows

LENGTH, VOCABULARY = 32, 128
TOKENIZER = TokenizerInfo("5" * 64, VOCABULARY, pad_id=0, unk_id=1, bos_id=2, eos_id=3, mask_id=4)
ROOT = Path(__file__).resolve().parent.parent
# What DeepSpeed and transformers would import when a run is under way, four seconds in all.
IMPORTED_LATE = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2")),
)
WIDTH_32 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = {
    "bert": WIDTH_32,
    "modernbert": {**WIDTH_32, "num_hidden_layers": 3, "local_attention": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": WIDTH_32,
    "llama": {**WIDTH_32, "num_key_value_heads": 2},
}


# ------------------------------------------------------------------------------------------------ data


def text(num_sequences: int, seed: int, *, sure: bool = False) -> np.ndarray:
    """Packed documents [num_sequences, LENGTH] of a Markov chain over words; the last sequence is padded.

    sure: each word has one successor only, so that a model can always be right.
    """
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(7).integers(5, VOCABULARY, (VOCABULARY, 1 if sure else 3))
    tokens: list[int] = []
    while len(tokens) < num_sequences * LENGTH:
        tokens.append(TOKENIZER.bos_id)
        word = int(rng.integers(5, VOCABULARY))
        for _ in range(int(rng.integers(6, 40))):
            tokens.append(word)
            word = int(successors[word, rng.integers(successors.shape[1])])
        tokens.append(TOKENIZER.eos_id)
    packed = np.array(tokens[: num_sequences * LENGTH]).reshape(num_sequences, LENGTH)
    packed[-1, LENGTH // 3 :] = TOKENIZER.pad_id
    return packed


def ragged_text(num_sequences: int, seed: int) -> np.ndarray:
    """The same with documents of 2 to LENGTH tokens, one a sequence: batches whose halves count unequally."""
    packed = text(num_sequences, seed)
    packed[packed == TOKENIZER.eos_id] = 5
    ends = np.random.default_rng(seed).integers(1, LENGTH, num_sequences)
    for sequence, end in zip(packed, ends, strict=True):
        sequence[0], sequence[end], sequence[end + 1 :] = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id
    return packed


def write_text_shards(
    folder: Path, *, train: int = 600, validation: int = 40, make: Callable[[int, int], np.ndarray] = text
) -> Path:
    """Shards of `make`, 100 samples each, with a tokenizer that `AutoTokenizer` opens. Returns the folder."""
    splits = {"train": make(train, 1), "validation": make(validation, 2)}
    write_shards(folder, splits, TOKENIZER, sequence_length=LENGTH, samples_per_shard=100)
    write_tokenizer(folder / "tokenizer")
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"w{i}" for i in range(5, VOCABULARY))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = dict(
        zip(("pad_token", "unk_token", "bos_token", "eos_token", "mask_token"), names, strict=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=words, **specials).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------ configs


def settings(shards: Path, run_dir: Path, **changes: Any) -> list[str]:
    """`key=value` arguments of a tiny fp32 run; `changes` use __ for the dot, e.g. optim__lr=0.1."""
    task = changes.get("data__task", "mlm")
    architecture = changes.get("model__architecture", "bert" if task == "mlm" else "gpt2")
    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    values = {
        "run_dir": str(run_dir),
        "data__shards": str(shards),
        "steps": 12,
        "batch_size": 8,
        "model__architecture": architecture,
        "model__overrides": {}
        if "model__init_from" in changes
        else {**SIZES[architecture], positions: LENGTH},
        "engine__dtype": "fp32",
        "teacher__dtype": "fp32",
        "optim__lr": 3e-3,
        "save__every": 5,
        "log__every": 3,
        "log__eval_every": 6,
        "log__eval_samples": 16,
        **changes,
    }
    return [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]


def config(shards: Path, run_dir: Path, **changes: Any) -> Config:
    return load_config([], settings(shards, run_dir, **changes))


# ------------------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Kill:
    """A signal to itself right `before` or after the `call`-th call of `function` ("module:name")."""

    function: str
    call: int = 1
    before: bool = True
    number: int = signal.SIGKILL

    def arm(self) -> None:
        """Wrap the function where it is defined."""
        module, _, path = self.function.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and self.before:
                os.kill(os.getpid(), self.number)
            result = function(*args, **kwargs)
            if calls == self.call and not self.before:
                os.kill(os.getpid(), self.number)
            return result

        return counted


@dataclass
class Ended:
    """How a process ended: exit code (negative: killed by that signal) and all that it wrote."""

    code: int
    output: str

    def ok(self) -> Ended:
        assert self.code == 0, self.output
        return self


class Started:
    """A `distill` command under way in a process of its own."""

    def __init__(
        self,
        arguments: list[str],
        output: Path,
        environ: dict[str, str] | None = None,
        kill: Kill | None = None,
        own_group: bool = False,
    ) -> None:
        self.output = output
        output.touch()
        target = (arguments, str(output), environ or {}, kill, own_group)
        self._process = _server().Process(target=_distill, args=target)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return int(self._process.pid)

    def is_alive(self) -> bool:
        return bool(self._process.is_alive())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self._process.kill()

    def wait(self, seconds: float = 240) -> Ended:
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"no end after {seconds} s:\n{self.output.read_text()}")
        return Ended(code, self.output.read_text())


def _server() -> Any:
    """Forks of a process that has imported torch and the loop but run nothing: a start costs no seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill.train", "distill.export", "tiny", *IMPORTED_LATE])
    return context


def _distill(
    arguments: list[str], output: str, environ: dict[str, str], kill: Kill | None, own_group: bool
) -> None:
    if own_group:
        os.setpgid(0, 0)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environ)
    warnings.simplefilter("ignore")
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a shell has started
    torch.set_num_threads(1)
    split_every_weight()
    if kill:
        kill.arm()
    from distill.__main__ import main

    sys.argv = ["distill", *arguments]
    sys.exit(main())


def split_every_weight() -> None:
    """Have ZeRO 3 split the smallest weight too; it keeps those below 100 000 numbers whole, here all."""
    from distill import engine

    plain = engine.deepspeed_settings

    def changed(*args: Any) -> dict[str, Any]:
        settings = plain(*args)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        settings["zero_optimization"]["sub_group_size"] = (
            3000  # several, as a model of more than 1e9 numbers has
        )
        return settings

    engine.deepspeed_settings = changed


def distill(arguments: list[str], folder: Path, kill: Kill | None = None) -> Ended:
    """Run `distill ARGUMENTS` to its end in a process of its own."""
    return Started(arguments, _new_output(folder), kill=kill).wait()


def rank_environs(size: int) -> list[dict[str, str]]:
    """The variables of each of `size` ranks on this machine, as torchrun sets them."""
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def distill_on_ranks(arguments: list[str], folder: Path, size: int, kill: Kill | None = None) -> list[Ended]:
    """The same on `size` ranks with the variables that torchrun sets; `kill` strikes rank 0."""
    kills = [kill] + [None] * (size - 1)
    started = [
        Started(arguments, _new_output(folder), environ, each)
        for environ, each in zip(rank_environs(size), kills, strict=True)
    ]
    first = started[0].wait()
    for other in started[1:]:
        if first.code < 0:  # a launcher ends the others when one dies
            other.kill()
    return [first, *(s.wait() for s in started[1:])]


def _new_output(folder: Path) -> Path:
    path = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    path.touch()
    return path


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# ------------------------------------------------------------------------------------------------ results


def rows(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(run_dir / METRICS, kind)]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Same rows, same weights, same result, to the bit."""
    assert rows(one) == rows(other)
    assert weights(one) == weights(other)
    assert (one / "result.json").read_bytes() == (other / "result.json").read_bytes()
