"""Checks the command line's overrides before Hydra does, and suggests what to type instead of an unknown one.

Hydra's own answers to `layer=3` or `blocksize=32` list files, or suggest a `+` that does not help. This module reads
the schema and the file names of conf/. It composes nothing and imports no torch.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import CONF_DIR, Config
from experiments.launchers import PRESETS

# Options with which choices may also come from other folders than conf/.
OWN_CHOICES = ("--config-dir", "-cd", "hydra.searchpath")
PATHS = ("model.path", "data.path", "cache.dir", "output_dir", "reference", "init", "paired")
MULTIRUN = ("-m", "--multirun")
SEVERAL_AT_ONCE = {"run.py": ("experiment",), "quantize_model.py": ("recipe",)}  # groups whose choices are presets
ONE_LAYER = ("bundle", "synthetic")  # choices of model and data for run.py alone
# What a value must be, by OmegaConf's words for one that is not.
WANTED = {
    "could not be converted to Integer": "use a whole number",
    "could not be converted to Float": "use a number",
    "is not a valid bool": "use true or false",
}
PLAIN_VALUE = re.compile(r"[^()\[\]{}$'\"]*")  # neither a glob, a list, an interpolation nor quoted


def refusal(arguments: Sequence[str], schema: type = Config, script: str = "run.py") -> str | None:
    """A message in one line about a command that Hydra would answer with several, or a traceback. None for the others.

    schema: the dataclass of the script's configuration.
    """
    return mistake(arguments, schema, script) or misplaced(arguments, script) or unreadable(arguments, script)


def mistake(arguments: Sequence[str], schema: type = Config, script: str = "run.py") -> str | None:
    """A message about the first wrong override, with the probable correction. None if Hydra may go on.

    schema: the dataclass of the script's configuration.
    """
    own_choices = any(argument.startswith(OWN_CHOICES) for argument in arguments)
    for argument in arguments:
        found = (
            _dashed(argument, schema) if argument.startswith("-") else _unknown(argument, own_choices, schema, script)
        )
        if found is not None:
            return found
    return None


def misplaced(arguments: Sequence[str], script: str) -> str | None:
    """A message about a flag between settings, which Hydra's parser refuses, or about several values without -m."""
    settings = ["=" in argument and not argument.startswith("-") for argument in arguments]
    for number, argument in enumerate(arguments):
        if argument.startswith("-") and any(settings[:number]) and any(settings[number:]):
            return f"{argument}: settings stand on both sides of it; type python experiments/{script} {argument} ..."
    if any(argument in MULTIRUN or argument.startswith("hydra.mode") for argument in arguments):
        return None
    for argument in arguments:
        try:
            if not argument.startswith("-") and OverridesParser.create().parse_override(argument).is_sweep_override():
                return f"{argument}: several values; type python experiments/{script} -m ... to run each of them"
        except HydraException:
            continue
    return None


def unreadable(arguments: Sequence[str], script: str) -> str | None:
    """A message about what Hydra's grammar does not take."""
    for argument in arguments:
        if argument in MULTIRUN:
            continue
        if argument.startswith("-"):
            return None  # what follows may be the flag's own
        key, equals, value = argument.partition("=")
        if not argument.startswith("~") and not (equals and key):
            return f"{argument}: settings are typed NAME=VALUE; python experiments/{script} --help lists them"
        if key in PATHS and not value.strip("\"' "):  # such as an unset variable of the shell
            return f"{argument}: it is empty; name a file or folder, or leave {key} out"
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            return f"{argument}: Hydra cannot read this value; type {_quoted(key, value)}"
    return None


def _quoted(key: str, value: str) -> str:
    """The override in the shell's quotes, with Hydra's around each text."""
    items = [item.strip().strip("\"'") for item in value.strip("[]").split(",")]
    inner = ",".join(f'"{item}"' for item in items)
    return shlex.quote(f"{key}=[{inner}]" if value.startswith("[") else f'{key}="{value}"')


@cache
def _settings(schema: type) -> dict[str, tuple[str, ...]]:
    """Group → its settings; "" → the settings without a group."""
    types = get_type_hints(schema)
    groups = {f.name: types[f.name] for f in fields(schema) if hasattr(types[f.name], "__dataclass_fields__")}
    plain = tuple(f.name for f in fields(schema) if f.name not in groups)
    return {"": plain} | {name: tuple(f.name for f in fields(group)) for name, group in groups.items()}


@cache
def _choices(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")))


def _keys(schema: type) -> list[str]:
    """Every setting, in full: block_size, layer.index and so on."""
    return [f"{group}.{name}" if group else name for group, names in _settings(schema).items() for name in names]


def _dashed(argument: str, schema: type) -> str | None:
    key, equals, value = argument.lstrip("-").partition("=")
    if not argument.startswith("--") or _flat(key) not in {
        _flat(known) for known in (*_keys(schema), *_settings(schema))
    }:
        return None
    meant = _close(key, schema)[0]
    return f"{argument}: settings have no dashes; type {meant}={value if equals else '...'}"


def _unknown(argument: str, own_choices: bool, schema: type, script: str) -> str | None:
    key, equals, value = argument.lstrip("+").partition("=")
    if not equals:
        group = next((group for group in _settings(schema) if group and argument in _choices(group)), None)
        return None if group is None else f"{argument}: a choice of {group}; type {group}={argument}"
    if key == "hydra/launcher" and value in PRESETS:
        return _missing_launcher(argument, PRESETS[value])
    if key.startswith(("hydra", "~")) or "@" in key or not re.fullmatch(r"[\w.-]+", key):
        return None
    groups = (*filter(None, _settings(schema)), *SEVERAL_AT_ONCE.get(script, ()))
    known = key in (*groups, *_keys(schema))
    if known and argument.startswith("+") and not argument.startswith("++"):
        return f"{argument}: {key} is there without a +; type {key}={value}"
    if key in groups:
        return None if own_choices else _no_choice(key, value, schema)
    if key in _keys(schema):
        return _wrong_value(argument, key, schema)
    group, dot, name = key.partition(".")
    if dot and group in _settings(schema) and not _close(name, schema, _settings(schema)[group]):
        return f"{key}: no such setting; {group} has {', '.join(_settings(schema)[group])}"
    meant = [f"{close}={value}" for close in _close(key, schema)]
    remedy = f"did you mean {' or '.join(meant)}?" if meant else f"python experiments/{script} --help lists them"
    return f"{key}={value}: no such setting; {remedy}"


def _wrong_value(argument: str, key: str, schema: type) -> str | None:
    """A message about a value of another type than the setting's; None for what Hydra says."""
    if "${" in argument:
        return None  # what it refers to is Hydra's to find
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException:
        return None
    if parsed.is_sweep_override() and not parsed.is_choice_sweep():
        return None
    for value in parsed.sweep_iterator() if parsed.is_choice_sweep() else [parsed.value()]:
        value = value.text if isinstance(value, QuotedString) else value
        group, dot, name = key.partition(".")  # a group of its own, because the schema's groups have no value yet
        where = get_type_hints(schema)[group] if dot else schema
        try:
            OmegaConf.update(OmegaConf.structured(where), name or key, value, force_add=False)
        except OmegaConfBaseException as error:
            return f"{argument}: {_why_wrong(key, value, str(error).splitlines()[0])}"
    return None


def _why_wrong(key: str, value: object, message: str) -> str:
    """OmegaConf's message with what to give instead."""
    if "is not a ListConfig" in message and key == "fused":
        return "use a list of lists, such as 'fused=[[q_proj,k_proj,v_proj],[gate_proj,up_proj]]'"
    if "is not a ListConfig" in message:
        return f"use a list, such as '{key}=[\"{value}\"]'"
    return next((f"{message}; {wanted}" for words, wanted in WANTED.items() if words in message), message)


def _missing_launcher(argument: str, package: str) -> str | None:
    plugin = f"hydra_plugins.hydra_{package}_launcher"
    try:
        found = importlib.util.find_spec(plugin) and importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found:
        return None
    return f"{argument}: needs hydra-{package}-launcher, which is not installed; pip install -e '.[launchers]'"


def _no_choice(group: str, value: str, schema: type) -> str | None:
    """A message about a value that is no file of conf/<group>, or None. value: one or several, with commas."""
    if not value.strip():
        return f"{group}=: it is empty; use {', '.join(_choices(group))}, or leave {group} out"
    if value == "null" or not PLAIN_VALUE.fullmatch(value):
        return None
    wrong = [choice for choice in value.split(",") if choice.strip() not in _choices(group)]
    if not wrong:
        return None
    meant = _meant_by(group, value, wrong[0], schema)
    choices = ", ".join(_choices(group))
    if meant is None:
        remedy = f"use {choices}"
    else:
        remedy = f"did you mean {meant}?" + (f" Choices: {choices}" if meant.startswith(f"{group}=") else "")
    return f"{group}={value}: no such choice of {group}; {remedy}"


def _meant_by(group: str, value: str, wrong: str, schema: type) -> str | None:
    """The override that was probably meant by `group=value`: a setting inside the group, or another choice."""
    if group == "layer":
        return f"layer.index={value}" if wrong.strip().isdigit() else f"layer.module={value}"
    if group in ("model", "data") and Path(wrong).expanduser().exists():
        return f"{group}.path={value}"
    if group in ("model", "data") and "/" in wrong:
        return f"{group}.repo={value} {group}.revision=main"
    close = _nearest(wrong, _choices(group))
    if close:
        return f"{group}={value.replace(wrong, close[0])}"
    inside = [name for name in _settings(schema).get(group, ()) if name not in ("name", "source", "path", "repo")]
    number = wrong.strip().replace(".", "", 1).isdigit()
    return f"{group}.{inside[0]}={value}" if number and len(inside) == 1 else None


def _close(key: str, schema: type, known: Iterable[str] | None = None) -> list[str]:
    """The known keys that `key` may mean: those with the same letters, else the same last part, else the nearest."""
    keys = [*_keys(schema), *(group for group in _settings(schema) if group)] if known is None else list(known)
    for part in (lambda k: k, lambda k: k.rpartition(".")[2]):
        same = [k for k in keys if _flat(part(k)) == _flat(key)]
        if same:
            return same
    return _nearest(key, keys)


def _nearest(key: str, keys: Iterable[str]) -> list[str]:
    by_letters = {_flat(k): k for k in keys}
    return [by_letters[found] for found in difflib.get_close_matches(_flat(key), by_letters, n=1, cutoff=0.7)]


def _flat(key: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", key.lower())


def choices_of(*groups: str, without: Collection[str] = ()) -> str:
    """`${choices_of:format,method}` in a help text: a line for each group, because Hydra lists those of all scripts.

    `${whole_model_choices_of:data,model}` leaves out ONE_LAYER.
    """
    lines = {group: [choice for choice in _choices(group) if choice not in without] for group in groups}
    return "\n".join(f"{group}: {', '.join(choices)}" for group, choices in lines.items())


OmegaConf.register_new_resolver("choices_of", choices_of, replace=True)
OmegaConf.register_new_resolver("whole_model_choices_of", partial(choices_of, without=ONE_LAYER), replace=True)
