"""Reads configs/*.py and the command line's `--config.a.b=value` on top of them."""

from __future__ import annotations

import ast
import dataclasses
import runpy
import traceback
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from emu_jax.config import current_key, from_dict, to_dict
from emu_jax.errors import UserError, suggest
from emu_jax.hardware import CHIPS
from emu_jax.storage import shipped

T = TypeVar("T")


def load_config(cls: type[T], path: Path, overrides: list[str], chip: str = "") -> T:
    """Loads the frozen dataclass `cls` from a config file and overrides.

    Every key of `cls` may be overridden, including those that the file leaves at their defaults.
    The file's `tuned` overrides for `chip` apply before `overrides`.

    Raises:
        UserError: as `read_config` and `emu_jax.config.from_dict`.
    """
    cfg = from_dict(cls, _plain(_run(path)))
    for name in getattr(cfg, "tuned", {}):
        if name not in CHIPS:
            raise UserError(f"{path}: tuned.{name}: no such chip{suggest(name, CHIPS)}")
    return override(cfg, [*getattr(cfg, "tuned", {}).get(chip, ()), *overrides])


def override(cfg: T, overrides: list[str]) -> T:
    """Returns a frozen dataclass with `a.b=value` overrides applied, as in `read_config`.

    Raises:
        UserError: as `read_config`.
    """
    return from_dict(type(cfg), _apply(to_dict(cfg), overrides))


def read_config(path: Path, overrides: list[str]) -> ConfigDict:
    """Runs `get_config()` of the Python file at `path` and applies `a.b=value` overrides.

    Values are Python literals, or else strings. A value must have the type of the one it replaces,
    except that an int may replace a float, anything may replace None, and None anything (the
    dataclass decides whether a key may be None). Elements of lists are named by their index:
    `optimizer.groups.0.lr=1e-4`.

    Raises:
        UserError: the file does not exist or fails, a key is unknown, or a value has the wrong
            type.
    """
    return ConfigDict(_apply(_plain(_run(path)), overrides))


def _apply(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    extended: set[str] = set()  # groups that were empty before
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE")
        _override(values, key, text, extended)
    return values


def _run(path: Path) -> Any:
    """Returns the result of the file's `get_config()`. A relative `configs/NAME.py` that does not
    exist is looked up among the configs of the package."""
    if not path.is_file() and path.parts[:1] == ("configs",):
        path = shipped("configs").joinpath(*path.parts[1:])
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.py"))
        hint = suggest(path.stem, known) if known else ""
        raise UserError(f"no config file {path}{hint}")
    try:
        module = runpy.run_path(str(path))
        if "get_config" not in module:
            raise UserError(f"{path} defines no get_config()")
        config = module["get_config"]()
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() must return a ConfigDict, not {config!r}")
    return config


def _plain(value: Any) -> Any:
    """Converts to dicts and lists at every depth. `ConfigDict.to_dict` skips those in lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _override(values: dict[str, Any], key: str, text: str, extended: set[str]) -> None:
    *path, last = parts = key.split(".")
    group: Any = values
    for depth, part in enumerate(path):
        index = _find(group, part, parts[:depth], extended)
        group = group.setdefault(index, {}) if isinstance(group, dict) else group[index]
    index = _find(group, last, path, extended)
    current = group.get(index) if isinstance(group, dict) else group[index]
    group[index] = _parse(text, current, key)


def _find(group: Any, part: str, above: list[str], extended: set[str]) -> str | int:
    """Returns the dict key or list index that `part` names in `group`.

    The command line may add keys to an empty group. `extended` collects these groups.
    """
    where = ".".join([*above, part])
    if isinstance(group, dict):
        if not group:
            extended.add(".".join(above))
        if part in group or ".".join(above) in extended:
            return part
        if (name := current_key(part, group)) in group:
            return name
        raise UserError(f"unknown config key {where!r}{suggest(part, group)}")
    if isinstance(group, list):
        if part in map(str, range(len(group))):
            return int(part)
        raise UserError(
            f"unknown config key {where!r}; {'.'.join(above)!r} is a list of {len(group)}"
        )
    raise UserError(f"unknown config key {where!r}; {'.'.join(above)!r} is a value, not a group")


def _parse(text: str, current: Any, key: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = {"true": True, "false": False}.get(text, text)
    if isinstance(current, dict) and value is not None:
        raise UserError(
            f"config key {key!r} is a group: set one of its keys; known: {', '.join(current)}"
        )
    value = _plain(value)
    if current is None or value is None or type(value) is type(current):
        return value
    if isinstance(current, str):
        return text  # a string that looks like a number
    if type(current) is float and type(value) is int:
        return float(value)
    expected = "list" if isinstance(current, list) else type(current).__name__
    raise UserError(f"config key {key!r} must be {expected}, not {text!r}")
