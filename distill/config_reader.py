"""Configs from YAML files and `key=value`: defaults < files < assignments, every problem reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill.config import Config, Ramp, fields_of
from distill.config_rules import check, has_teacher


class ConfigError(ValueError):
    """All that is wrong with a config, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(
            "the config has " + f"{len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems)
        )


def load_config(files: list[str | Path], assignments: list[str]) -> Config:
    """Merge defaults < YAML `files` in order < `key=value` assignments, and check the whole.

    An assignment is `a.b=value`, the value in YAML.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range and contradictions, all at once.
    """
    config = Config()
    problems = fill(config, files, assignments)
    if not config.objective.weights:
        config.objective.weights = {"forward_kl": 1.0} if has_teacher(config) else {"hard": 1.0}
    if not problems:
        problems += check(config)
    if problems:
        raise ConfigError(problems)
    return config


def fill(config: Any, files: Sequence[str | Path], assignments: Sequence[str]) -> list[str]:
    """Put YAML files in order, then assignments into a dataclass of settings, nested or not. Returns the problems."""
    problems: list[str] = []
    layers = [_read_yaml(Path(f), problems) for f in files]
    layers += [_parse_assignment(a, problems) for a in assignments]
    for layer in layers:
        _merge(config, layer, "", config, problems)
    return problems


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"{path} can't be read as YAML: {error}")
        return {}
    if content is not None and not isinstance(content, dict):
        problems.append(f"{path} must hold `key: value` lines, got {type(content).__name__}")
        return {}
    return content or {}


def _parse_assignment(text: str, problems: list[str]) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        problems.append(f"{text!r} is not of the form key=value, e.g. optim.lr=0.001")
        return {}
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        problems.append(f"{text!r}: the value is not YAML: {error}")
        return {}
    for name in reversed(key.split(".")):
        nested = Inside({name: nested})
    return nested


class Inside(dict[str, Any]):
    """What a dotted key says: it changes one entry of a setting that is a mapping, where a mapping replaces it."""


def _plain(value: Any) -> Any:
    return {key: _plain(v) for key, v in value.items()} if isinstance(value, dict) else value


def _merge(target: Any, layer: dict[str, Any], prefix: str, whole: Any, problems: list[str]) -> None:
    hints = typing.get_type_hints(type(target))
    for name, value in layer.items():
        if name not in hints:
            problems.append(f"unknown key {prefix}{name}{_nearest(str(name), prefix, list(hints), whole)}")
        elif dataclasses.is_dataclass(getattr(target, name)):
            if isinstance(value, dict):
                _merge(getattr(target, name), value, f"{prefix}{name}.", whole, problems)
            else:
                problems.append(
                    f"{prefix}{name} is a group of settings, got {value!r}; set e.g. {prefix}{name}.KEY=..."
                )
        else:
            before = getattr(target, name)
            if isinstance(value, Inside) and isinstance(before, dict):
                value = before | _plain(value)
            try:
                setattr(target, name, coerce(value, hints[name]))
            except ValueError as error:
                problems.append(f"{prefix}{name}: {error}")


def _nearest(name: str, prefix: str, names: list[str], whole: Any) -> str:
    """The nearest valid key, looked for in its own group first, then in all of them."""
    everywhere = {key.rsplit(".", 1)[-1]: key for key, _, _ in fields_of(whole)}
    close = difflib.get_close_matches(name, names, n=1)
    if not close and (elsewhere := difflib.get_close_matches(name, everywhere, n=1)):
        return f"; did you mean {everywhere[elsewhere[0]]}?"
    return f"; did you mean {prefix}{close[0]}?" if close else f"; valid here: {', '.join(names)}"


def coerce(value: Any, hint: Any) -> Any:
    """`value` as the annotated type `hint`; raises ValueError saying what was expected and what was got."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return coerce(value, option)
            except ValueError:
                continue
    elif origin is list and isinstance(value, list):
        return [coerce(v, args[0]) for v in value]
    elif origin is dict and isinstance(value, dict):
        return {str(k): coerce(v, args[1]) for k, v in value.items()}
    elif hint is Any:
        return value
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            if math.isfinite(number := float(value)):  # YAML reads 1e-3 as text
                return number
        except ValueError:
            pass
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"expected {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    if hint == Ramp:
        return "a number or a list of [share, value]"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
