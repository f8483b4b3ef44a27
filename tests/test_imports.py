"""The arrows of the design: imports go down, never up or in a ring; heavy libraries stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("distill", "data_prep")

# Rooms of `distill` by floor: a room may import its own floor and those below. data_prep is below them all.
FLOORS = {
    0: {
        "config",
        "config_reader",
        "config_rules",
        "method_rules",
        "schedule",
        "distributed",
        "head",
        "hardware",
        "models",
        "pretrained",
        "pruning",
        "retokenize",
        "units",
        "targets",
        "files",
        "signals",
        "sample_order",
        "zero_files",
    },
    1: {"kernels", "data", "engine", "metrics", "trajectory", "run_folder", "intact", "memory"},
    2: {
        "objectives",
        "teacher",
        "ensemble",
        "stored_teacher",
        "checkpoint",
        "probes",
        "plan",
        "plan_text",
        "growing",
        "attempts",
        "speculative",
    },
    3: {"train", "score", "score_shards", "evaluate", "build", "accounting", "export"},
    4: {"experiments", "__main__"},
}
# Library -> the files (or folders) that may import it.
CONFINED = {
    "deepspeed": ("distill/engine.py",),
    "obstore": ("distill/trajectory/store.py",),
    "triton": ("distill/kernels/",),
    "webdataset": ("data_prep/verify.py", "distill/data.py"),
}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """(imported module or name, line) of every import in a file, also those inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            base = ".".join(part for part in (above, node.module) if part)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def hidden_imports(root: Path) -> list[str]:
    """Modules of this project imported by name in a call, where the arrows above do not see them."""
    return [
        f"{path.relative_to(root)}:{node.lineno} hides an import of {node.args[0].value}"
        for path in sources(root).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
        if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        if str(node.args[0].value).split(".")[0] in ("", *PACKAGES)
    ]


def edges(modules: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Module -> the modules of this project it imports, with the line. A name counts as its module."""
    graph: dict[str, dict[str, int]] = {}
    for name, path in modules.items():
        graph[name] = {}
        for target, line in imports(name, path):
            known = target if target in modules else target.rpartition(".")[0]
            if known in modules and known != name:
                graph[name].setdefault(known, line)
    return graph


def floor_of(module: str) -> int:
    package, _, rest = module.partition(".")
    if package == "data_prep" or not rest:
        return -1
    room = rest.split(".")[0]
    for floor, rooms in FLOORS.items():
        if room in rooms:
            return floor
    raise AssertionError(f"distill.{room} has no floor: add it to FLOORS in tests/test_imports.py")


def upward(graph: dict[str, dict[str, int]]) -> list[str]:
    """Imports that go to a higher floor. What nobody imports still needs a floor."""
    floors = {module: floor_of(module) for module in graph}
    return [
        f"{module}:{line} imports {target} from a higher floor"
        for module, targets in graph.items()
        for target, line in targets.items()
        if floors[target] > floors[module] and target != "distill"
    ]


def ring(graph: dict[str, dict[str, int]]) -> list[str]:
    """One ring of imports as a list of modules, or an empty list."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (walk(target, [*trail, module]) for target in graph[module])), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in graph)), [])


def strays(root: Path) -> list[str]:
    """Imports of confined libraries outside their rooms."""
    return [
        f"{path.relative_to(root)}:{line} imports {target}; only {' and '.join(CONFINED[library])} may"
        for name, path in sources(root).items()
        for target, line in imports(name, path)
        if (library := target.split(".")[0]) in CONFINED
        and not path.relative_to(root).as_posix().startswith(CONFINED[library])
    ]


def make_tree(root: Path, **files: str) -> dict[str, dict[str, int]]:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return edges(sources(root))


def test_imports_never_go_up() -> None:
    assert upward(edges(sources(ROOT))) == []


def test_imports_never_form_a_ring() -> None:
    assert ring(edges(sources(ROOT))) == []


def test_data_prep_knows_nothing_of_distill() -> None:
    graph = edges(sources(ROOT))
    assert graph["data_prep"] is not None
    guilty = {
        m: t for m, t in graph.items() if m.startswith("data_prep") for x in t if x.startswith("distill")
    }
    assert guilty == {}


def test_no_import_is_hidden_in_a_call() -> None:
    assert hidden_imports(ROOT) == []


def test_confined_libraries_stay_in_their_rooms() -> None:
    assert strays(ROOT) == []


def test_config_and_data_prep_load_without_torch() -> None:
    check = "import sys, distill.config_reader, data_prep.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_no_except_is_bare() -> None:
    folders = (*PACKAGES, "tests")
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_the_walk_sees_an_import_that_goes_up(tmp_path: Path) -> None:
    graph = make_tree(
        tmp_path, distill__config="def f():\n    from distill.train import x\n", distill__train=""
    )
    assert upward(graph) == ["distill.config:2 imports distill.train from a higher floor"]
    graph = make_tree(tmp_path, distill__config="", data_prep__shards="from distill import config")
    assert upward(graph) == ["data_prep.shards:1 imports distill.config from a higher floor"]


def test_the_walk_sees_a_ring_through_relative_imports(tmp_path: Path) -> None:
    graph = make_tree(
        tmp_path,
        distill__kernels__a="from .b import x",
        distill__kernels__b="from . import c",
        distill__kernels__c="import distill.kernels.a",
    )
    assert ring(graph) == ["distill.kernels.a", "distill.kernels.b", "distill.kernels.c", "distill.kernels.a"]


def test_the_walk_sees_a_library_outside_its_room(tmp_path: Path) -> None:
    make_tree(tmp_path, distill__train="import deepspeed.ops", distill__engine="import deepspeed")
    assert strays(tmp_path) == [
        "distill/train.py:1 imports deepspeed.ops; only distill/engine.py may",
    ]


def test_the_walk_sees_an_import_hidden_in_a_call(tmp_path: Path) -> None:
    hidden = "import importlib\nx = importlib.import_module('data_prep.pack')\nimportlib.import_module(x)"
    make_tree(tmp_path, data_prep__shards=hidden, data_prep__pack="import_module('torch')")
    assert hidden_imports(tmp_path) == ["data_prep/shards.py:2 hides an import of data_prep.pack"]


def test_a_room_without_a_floor_is_told_where_to_go() -> None:
    with pytest.raises(AssertionError, match=r"distill\.attic has no floor: add it to FLOORS"):
        floor_of("distill.attic.box")
