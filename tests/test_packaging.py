"""What an installation brings: pins that hold for every Python served, the library where it can be built."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import ROOT, imports, sources

import distill
from distill.kernels import cpu

REQUIREMENTS = ROOT / "requirements.txt"


def requirements() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_one_exact_pin_for_each_python(version: str) -> None:
    environment = {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "platform_system": "Linux",
    }
    names = [canonicalize_name(r.name) for r in requirements()]
    served = [r for r in requirements() if r.marker is None or r.marker.evaluate(environment)]
    assert [canonicalize_name(r.name) for r in served] == list(dict.fromkeys(names))
    assert all([s.operator for s in r.specifier] == ["=="] for r in served)


def declared() -> list[Requirement]:
    """The dependencies in pyproject.toml, a list of strings as in Python (3.10 has no tomllib)."""
    found = re.search(
        r"^dependencies = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert found
    return [Requirement(line) for line in ast.literal_eval(found[1])]


@pytest.mark.parametrize("listed", [requirements, declared])
def test_every_library_that_is_imported_is_listed(listed: Callable[[], list[Requirement]]) -> None:
    names = {canonicalize_name(r.name) for r in listed()}
    distributions = importlib.metadata.packages_distributions()
    missing = {
        f"{module} imports {target}"
        for module, path in sources(ROOT).items()
        for target, _ in imports(module, path)
        if (top := target.split(".")[0]) not in sys.stdlib_module_names | {"distill", "data_prep"}
        and not names & {canonicalize_name(name) for name in distributions.get(top, [top])}
    }
    assert missing == set()


def test_what_is_pinned_lies_within_the_declared_bounds() -> None:
    bounds = {canonicalize_name(r.name): r.specifier for r in declared()}
    for pin in requirements():
        (version,) = (s.version for s in pin.specifier)
        assert version in bounds.get(canonicalize_name(pin.name), pin.specifier), pin


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python"; exit "$VENV_FAILS" ;;
    *"pip --version"*) exit 1 ;;
    *) echo "ran $*" ;;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("there", [False, True], ids=["none yet", "half-made"])
def test_an_environment_that_cannot_be_made_says_what_to_install(tmp_path: Path, there: bool) -> None:
    fake = tmp_path / "python3"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    if there:
        (tmp_path / "venv/bin").mkdir(parents=True)
        shutil.copy(fake, tmp_path / "venv/bin/python")
        (tmp_path / "venv/pyvenv.cfg").touch()
    target = tmp_path / "venv" / ".requirements"
    command = ["make", str(target), f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"]
    for fails in ("1", "0"):  # the second time, as after `apt install`
        environment = os.environ | {"VENV_FAILS": fails}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ("apt install python3-venv" in done.stdout) == (done.returncode != 0) == (fails == "1")
        assert target.exists() == (fails == "0")


def test_metadata_and_command_are_those_of_the_source() -> None:
    assert importlib.metadata.version("distill") == distill.__version__
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="distill")
    assert command.value == "distill.__main__:main" and callable(command.load())


def test_without_the_library_the_reference_serves_and_says_why() -> None:
    script = """
import logging, torch, distill.kernels as kernels
logging.basicConfig(level=logging.INFO, format="%(message)s")
logits = torch.eye(3)
for _ in range(2):
    print(kernels.divergence(logits, logits, None).soft.item())
kernels.divergence(logits, logits, None, impl="cpu")
"""
    done = python("-c", script, DISTILL_CSRC="0")
    assert done.stdout.split() == ["0.0", "0.0"]
    assert done.stderr.count("eager reference (switched off by DISTILL_CSRC=0)") == 1
    assert "ValueError: impl='cpu' can not serve: switched off by DISTILL_CSRC=0" in done.stderr


def test_kernels_say_on_request_which_operators_there_are() -> None:
    assert "switched off" in python("-m", "distill.kernels", DISTILL_CSRC="0").stdout


@pytest.mark.skipif(not cpu.LIBRARY.exists() or not shutil.which("nm"), reason="needs the library and nm")
def test_library_uses_the_stable_abi_only() -> None:
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(cpu.LIBRARY)], capture_output=True, text=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [s for s in symbols if s.startswith(("at::", "c10::", "torch::", "Py", "_Py"))] == []


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """The source alone: a build leaves folders behind and takes what lies there."""
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "distill", "data_prep"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(source: Path, hook: str, **environment: str) -> tuple[str, list[str]]:
    """What pip's build hook said, and the names in the wheel."""
    script = f"from setuptools import build_meta; build_meta.{hook}('out')"
    (source / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "out").glob("*.whl")
    return done.stdout + done.stderr, zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
@pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="no C++ compiler built the library here either")
def test_wheel_holds_the_library_the_configs_and_the_licence(source_copy: Path) -> None:
    said, names = build(source_copy, "build_wheel")
    assert "not built" not in said
    assert "distill/kernels/libdistill.so" in names
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "distill/configs").rglob("*.yaml")}
    assert configs <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="no C++ compiler built the library here either")
def test_editable_installation_puts_the_library_beside_the_source(source_copy: Path) -> None:
    build(source_copy, "build_editable")
    assert (source_copy / "distill/kernels/libdistill.so").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
@pytest.mark.parametrize(
    "compiler, reason", [("no-such-compiler", "no C++ compiler no-such-compiler"), ("false", "failed")]
)
def test_without_a_working_compiler_installation_succeeds_and_says_so_once(
    source_copy: Path, hook: str, compiler: str, reason: str
) -> None:
    said, names = build(source_copy, hook, CXX=compiler)
    assert said.count("C++ operators not built") == 1 and reason in said
    assert not any(name.endswith(".so") for name in names)
    assert not list(source_copy.rglob("*.so"))
