"""`distill trajectory ...`: its arguments, and what each command calls and prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

SOURCE = """SOURCE and TRAJECTORY are a folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or https://...;
a SOURCE to index also hf://owner/name (a revision a checkpoint), hf://owner/name-* (a repository a checkpoint)
or a local cache of the hub. Credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION, AWS_SKIP_SIGNATURE=true for public buckets; GOOGLE_...; AZURE_...; HF_TOKEN, HF_ENDPOINT."""
NAMES = """Names that are known: step_N, stepN (Pythia), [stageK-]stepN-tokensMB (OLMo), ckpt_N (LLM360), step-N-MBT (FineWeb),
step-N (SmolLM2), stageK-step-N (SmolLM3), multiberts-seed_S-step_Nk, checkpoint-N, global_stepN."""


def add_commands(trajectory: argparse.ArgumentParser) -> Any:
    """Add the sub-commands. Returns the action that holds them."""
    actions = trajectory.add_subparsers(dest="action", required=True)

    def command(name: str, help: str, more: str = "") -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return actions.add_parser(
            name, help=help, description=help, epilog=more + SOURCE, formatter_class=raw
        )

    index = command("index", "write the manifest of checkpoints that came without one", NAMES + "\n\n")
    index.add_argument("source", metavar="SOURCE")
    index.add_argument("--out", help="folder or URL for the manifest (default: beside the checkpoints)")
    index.add_argument("--pattern", help=r"of other names: a regular expression with (?P<step>\d+)")
    index.add_argument("--stage", help="name or pattern of the stage to take, where the names tell several")
    index.add_argument(
        "--full", action="store_true", help="read remote weights to hash them; from others nobody learns"
    )
    index.add_argument(
        "--steps", type=steps_of, metavar="N,N", help="with --full: of these alone (default: all)"
    )
    index.add_argument(
        "--allow-bin", action="store_true", help="take pickled weights (.bin) where there are no others"
    )

    audit = command("audit", "judge every checkpoint by headers and samples; exit code 1 if any is bad")
    audit.add_argument("trajectory", metavar="TRAJECTORY")
    audit.add_argument("--full", action="store_true", help="read every byte: hashes, and all values finite")
    audit.add_argument(
        "--trust", type=steps_of, default=[], metavar="N,N", help="steps to use whatever is found"
    )
    audit.add_argument(
        "--json", metavar="FILE", help="write the verdicts there too, - for stdout instead of the table"
    )

    pull = command("pull", "fetch checkpoints into a folder, verified; pickled weights become safetensors")
    pull.add_argument("trajectory", metavar="TRAJECTORY")
    pull.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    pull.add_argument("--steps", type=steps_of, metavar="N,N", help="default: all")

    publish = command(
        "publish", "send a trajectory that lies in a folder to object storage; goes on where it was cut off"
    )
    publish.add_argument("trajectory", metavar="FOLDER")
    publish.add_argument("--to", required=True, metavar="URL", help="s3://bucket/prefix, gs://..., az://...")

    ls = command(
        "ls", "draw the trajectory: steps, tokens, sizes, validation losses (nats a token), verdicts"
    )
    ls.add_argument("trajectory", metavar="TRAJECTORY")

    diff = command("diff", "what differs between two trajectories; exit code 1 if anything does")
    diff.add_argument("trajectory", metavar="TRAJECTORY")
    diff.add_argument("other", metavar="TRAJECTORY")
    return actions


def steps_of(text: str) -> list[int]:
    """`1,2,512` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"steps are numbers with commas between, got {text!r}") from None


def run(arguments: argparse.Namespace) -> int:
    """Call what is behind the command. Returns the exit code."""
    actions = {"index": _index, "audit": _audit, "pull": _pull, "publish": _publish, "ls": _ls, "diff": _diff}
    return actions[arguments.action](arguments)


def _index(arguments: argparse.Namespace) -> int:
    from distill.trajectory.index import index_trajectory

    options = {name: getattr(arguments, name) for name in ("pattern", "stage", "full", "steps", "allow_bin")}
    manifest = index_trajectory(arguments.source, arguments.out, **options)
    print(f"{manifest.family}: {len(manifest.checkpoints)} checkpoints, steps {list(manifest.checkpoints)}")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from distill.trajectory.audit.report import audit
    from distill.trajectory.audit.verdicts import store_audit
    from distill.trajectory.manifest import load_manifest
    from distill.trajectory.show import audit_lines

    manifest = load_manifest(arguments.trajectory)
    found = audit(manifest, full=arguments.full, trusted=arguments.trust)
    store_audit(manifest.store, found)
    if arguments.json == "-":
        print(found.to_json())
    else:
        _print(audit_lines(found))
        if arguments.json:
            Path(arguments.json).write_text(found.to_json() + "\n", encoding="utf-8")
    return 1 if found.bad else 0


def _pull(arguments: argparse.Namespace) -> int:
    from distill.trajectory.manifest import load_manifest
    from distill.trajectory.pull import pull

    local = pull(load_manifest(arguments.trajectory), arguments.to, arguments.steps)
    print(f"{local.url}: {len(local.checkpoints)} checkpoints, steps {list(local.checkpoints)}")
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from distill.trajectory.publish import publish

    there = publish(arguments.trajectory, arguments.to)
    print(f"{there.url}: {len(there.checkpoints)} checkpoints, steps {list(there.checkpoints)}")
    return 0


def _ls(arguments: argparse.Namespace) -> int:
    from distill.trajectory.audit.verdicts import read_audit
    from distill.trajectory.manifest import load_manifest
    from distill.trajectory.show import trajectory_lines

    manifest = load_manifest(arguments.trajectory)
    _print(trajectory_lines(manifest, read_audit(manifest.store)))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from distill.trajectory.manifest import load_manifest
    from distill.trajectory.show import difference_lines

    lines = list(difference_lines(load_manifest(arguments.trajectory), load_manifest(arguments.other)))
    _print(lines or ["no difference"])
    return 1 if lines else 0


def _print(lines: Any) -> None:
    """Lines to stdout, plain ones where the terminal has no other characters."""
    for line in lines:
        encoding = sys.stdout.encoding or "ascii"
        print(line.encode(encoding, "replace").decode(encoding))
