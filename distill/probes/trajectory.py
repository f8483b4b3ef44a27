"""The probes over a whole trajectory, checkpoint by checkpoint; what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data_prep.progress import progress
from distill.config import Config
from distill.data import Samples
from distill.distributed import World
from distill.engine import own_part
from distill.files import write_text
from distill.models import quiet_transformers
from distill.pretrained import empty_model
from distill.probes.ngrams import choose_places, ngram_dependence
from distill.probes.nonterminals import (
    NonterminalQuestion,
    NonterminalStudy,
    ask_nonterminals,
    majority,
    nonterminal_figures,
)
from distill.probes.quality import chance, frequency_ranks, measure
from distill.probes.report import (
    bucket_table,
    nonterminal_table,
    plot,
    plot_nonterminals,
    selector_table,
    table,
)
from distill.probes.selectors import ask, select_figures
from distill.probes.transition import Suggestion, suggest_schedule
from distill.teacher import check_vocabulary
from distill.trajectory.manifest import BadTrajectory, Manifest, load_manifest
from distill.trajectory.stream import CheckpointStream, make_fetcher

RESULTS, PICTURE, SCHEDULE = "probe.json", "probe.png", "schedule.yaml"
NONTERMINALS = "nonterminals.png"
_MICRO = 64  # sequences a forward, unless micro_batch_size says otherwise
_LATER = ("student", "nonterminals")  # questions that may be added to those of an earlier run
Figures = Callable[[PreTrainedModel], dict[str, Any]]


@dataclass(frozen=True)
class ProbeSettings:
    """What is asked of every checkpoint."""

    sizes: tuple[int, ...] = (2, 3, 4, 5)  # of n-grams
    sequences: int = 128  # with places where n-grams are hidden
    places: int = 4  # in each of these
    steps: tuple[int, ...] = ()  # of the teacher; none: all
    nonterminals: NonterminalStudy | None = None  # of shards with parse spans


def probe(
    trajectory: str | Path,
    config: Config,
    settings: ProbeSettings,
    out: Path,
    student: Callable[[Config, Samples], PreTrainedModel] | None = None,
) -> dict[str, Any]:
    """Ask every checkpoint, write `probe.json` and pictures to `out`. Returns what probe.json holds.

    trajectory: a folder or a URL (see `open_store`); what lies elsewhere comes through the cache of `config.teacher`.
    student: makes the model that is to learn; then also how much each knows, and how hard it is to follow.

    Raises:
        ValueError: (and its kinds) an empty trajectory, one of other token ids or task, n-grams that fit nowhere,
            shards without parse spans, an `out` that holds the answers to other questions.
        StoreError: what storage could not do.
    """
    _check(settings)
    quiet_transformers()
    manifest = load_manifest(trajectory)
    samples = Samples(config.data, "validation", 0, shuffle=False)
    check_vocabulary(manifest, samples.tokenizer)
    steps = _steps(manifest, settings)
    grammar = ask_nonterminals(config.data, settings.nonterminals) if settings.nonterminals else None
    asked = _asked(config, settings, samples, student, grammar)
    later = {"student": {**asdict(config.model), "seed": config.seed}} if student else {}
    if grammar:
        later["nonterminals"] = {**asdict(grammar.study), "train": grammar.samples.fingerprint}
    found = _begun(out, _questions(manifest, config, settings, samples) | later)
    found["chance"] = chance(samples, config.log.eval_samples, config.micro_batch_size or _MICRO)
    found |= {"last_step": max(manifest.checkpoints), "complete": manifest.complete}
    if grammar:
        found["majority"] = majority(grammar.held_out)
    weights = {step: list(manifest.checkpoints[step].weights) for step in steps}
    rows = _known_rows(found, weights)
    todo = [step for step in steps if asked.keys() - rows.get(step, {}).keys()]
    models = checkpoints(manifest, config, samples.sequence_length, todo)
    with progress("probe", len(steps), " checkpoints", len(steps) - len(todo)) as advance:
        for step, model in models:
            row = rows.setdefault(step, {"step": step, "weights": weights[step]})
            for key, figures in asked.items():
                if key not in row:
                    row |= figures(model)
            found["checkpoints"] = [rows[done] for done in sorted(rows)]
            write_text(out / RESULTS, json.dumps(found, indent=1))
            advance(1)
    found["checkpoints"] = [rows[step] for step in steps]
    plot(found["checkpoints"], settings.sizes, None, manifest.url, out / PICTURE)
    if grammar:
        plot_nonterminals(found["checkpoints"], manifest.url, out / NONTERMINALS)
    return found


def _asked(
    config: Config,
    settings: ProbeSettings,
    samples: Samples,
    student: Callable[[Config, Samples], PreTrainedModel] | None,
    grammar: NonterminalQuestion | None,
) -> dict[str, Figures]:
    """What every checkpoint is asked, by a key that its row has if it was."""
    limit, micro = config.log.eval_samples, config.micro_batch_size or _MICRO
    places = choose_places(samples, settings.sequences, settings.places, settings.sizes)
    ranks = frequency_ranks(Samples(config.data, "train", 0, shuffle=False).reader)

    def basic(model: PreTrainedModel) -> dict[str, Any]:
        figures = measure(model, samples, ranks, limit, micro)
        return {**figures, **ngram_dependence(model, samples, places, settings.sizes, micro)}

    asked: dict[str, Figures] = {"loss": basic}
    if student:
        learner = cache(lambda: ask(samples, student(config, samples).eval(), ranks, limit, micro))
        asked["complexity"] = lambda model: select_figures(model, learner())
    if grammar:
        asked["nonterminals"] = lambda model: {"nonterminals": nonterminal_figures(model, grammar)}
    return asked


def report(found: dict[str, Any], sizes: Sequence[int]) -> str:
    """The tables of what `probe` found."""
    rows = found["checkpoints"]
    parts = [
        table(rows, sizes),
        "knowing frequencies alone: loss {loss:.4f}, top-1 {accuracy:.4f}".format(**found["chance"]),
    ]
    parts += ["log-loss / top-1 by the label's frequency rank", bucket_table(rows)]
    if all("complexity" in row for row in rows):
        parts += ["information (nats) and supervision complexity", selector_table(rows)]
    if all("nonterminals" in row for row in rows):
        parts += [
            "non-terminals named right, at the ends of their spans",
            nonterminal_table(rows, found["majority"]),
        ]
    return "\n\n".join(parts)


def write_suggestion(found: dict[str, Any], sizes: Sequence[int], out: Path) -> Suggestion:
    """Write `schedule.yaml` to `out` and mark its checkpoint in the picture.

    Raises:
        NoTransition: the trajectory shows none.
        BadTrajectory: the teacher's run has not ended, so that nobody knows the final teacher.
    """
    heading = found["questions"]["trajectory"]
    if not found["complete"]:
        raise BadTrajectory(
            f"{heading}: the teacher's run has not ended, its newest checkpoint is step {found['last_step']}: let it end "
            "and ask again, or choose both steps from the table, for schedule.kind=two_shot schedule.checkpoints=[EARLY,FINAL]"
        )
    suggestion = suggest_schedule(found["checkpoints"], found["chance"], final=found["last_step"])
    write_text(out / SCHEDULE, suggestion.to_yaml())
    plot(found["checkpoints"], sizes, suggestion.early, heading, out / PICTURE)
    return suggestion


def _check(settings: ProbeSettings) -> None:
    if not settings.sizes or min(settings.sizes) < 2:
        raise ValueError(f"--ngrams {list(settings.sizes)}: numbers of 2 or more expected")
    if settings.sequences < 1 or settings.places < 1:
        raise ValueError(
            f"--sequences and --places must be at least 1, got {settings.sequences} and {settings.places}"
        )


def _steps(manifest: Manifest, settings: ProbeSettings) -> list[int]:
    known = [step for step in manifest.checkpoints if step > 0]
    if not known:
        raise BadTrajectory(
            f"{manifest.url} has no checkpoint after step 0: let the teacher's run leave some first"
        )
    if missing := sorted(set(settings.steps) - set(known)):
        raise BadTrajectory(f"{manifest.url} has no teacher step {missing[0]}; it has {known}")
    return sorted(settings.steps or known)


def _questions(
    manifest: Manifest, config: Config, settings: ProbeSettings, samples: Samples
) -> dict[str, Any]:
    """All that decides the answers."""
    asked = {key: value for key, value in asdict(settings).items() if key not in ("steps", *_LATER)}
    data = {key: value for key, value in asdict(config.data).items() if key not in ("shards", "num_workers")}
    # A causal model's n-grams were hidden by other words in earlier versions.
    hidden_by = {"hidden_by": "words drawn once"} if config.data.task == "clm" else {}
    return {
        **hidden_by,
        "trajectory": manifest.url,
        "samples": samples.fingerprint,
        "eval_samples": config.log.eval_samples,
        **json.loads(json.dumps(asked | data)),
    }


def _begun(out: Path, questions: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run found, or nothing yet. What is asked for the first time joins its questions."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / RESULTS).exists():
        return {"questions": questions, "checkpoints": []}
    found: dict[str, Any] = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    for key, value in questions.items():
        if key in _LATER:
            found["questions"].setdefault(key, value)
        if found["questions"].get(key) != value:
            raise ValueError(
                f"{out / RESULTS} answers another question: its {key} is {found['questions'].get(key)!r}, now {value!r}; "
                "give another folder to --out, or delete this one"
            )
    return found


def _known_rows(found: dict[str, Any], weights: dict[int, list[str]]) -> dict[int, dict[str, Any]]:
    """What an earlier run found, by step; not of checkpoints that have other weights now."""
    rows = {row["step"]: row for row in found["checkpoints"]}
    return {step: row for step, row in rows.items() if weights.get(step, row["weights"]) == row["weights"]}


def checkpoints(
    manifest: Manifest, config: Config, sequence_length: int, steps: Sequence[int]
) -> Iterator[tuple[int, PreTrainedModel]]:
    """(teacher step, model) of each step: verified, fp32, on the GPU if there is one; the next is read meanwhile.

    One model, whose weights the next step overwrites.
    """
    if not steps:
        return
    alone = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    fetcher = make_fetcher(manifest, config.teacher, alone)
    with fetcher.at_hand(steps[0], steps[1:]) as folder:
        model = empty_model(config.data.task, folder, torch.float32, sequence_length).eval()
        model = model.to(device=alone.device)
        stream = CheckpointStream(fetcher, folder, model, own_part)
    try:
        for index, step in enumerate(steps):
            stream.swap_in(step)
            if following := steps[index + 1 :]:
                stream.prefetch(following[0], following[1:])
            yield step, model
    finally:
        stream.close()
