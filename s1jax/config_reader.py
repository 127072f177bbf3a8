"""From YAML files and `section.key=value` words to a configuration, with errors that name the key.

The help text is made from the dataclasses of `config`, so a key exists in one place only.
"""

import dataclasses
import difflib
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from s1jax.paths import AnyPath, PathError, any_path

Root = TypeVar("Root")
_NAME = "NAME"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem."""


def load_config(root: type[Root], words: Sequence[str]) -> Root:
    """Read a configuration from command-line words: YAML files and `section.key=value`, later ones winning.

    A YAML file may name one other with `extends:`, a path relative to itself, whose values it overrides; all may be
    gs:// and s3://.
    Raises ConfigError with every unknown key, wrong type and missing value.
    """
    tree: dict[str, Any] = {}
    for word in words:
        if "=" in word:
            key, _, value = word.partition("=")
            _merge(tree, _nested(key, _parse(value, word)))
        elif word.endswith((".yaml", ".yml")):
            _merge(tree, _read_yaml(word, None))
        else:
            raise ConfigError(f"{word!r} is neither a YAML file nor key=value")
    try:
        return TypeAdapter(root).validate_python(tree)
    except ValidationError as error:
        known = config_keys(root)
        problems = sorted({_explain(e, known) for e in error.errors()})
        raise ConfigError("\n".join(problems)) from None


def config_help(root: type[Any], usage: str) -> str:
    """The help text of a command: every key with its type, default and meaning."""
    rows = [(key, kind, default, info.description or "") for key, (kind, default, info) in config_keys(root).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"  {key:<{widths[0]}}  {kind:<{widths[1]}}  {default:<{widths[2]}}  {text}"
        for key, kind, default, text in rows
    ]
    return f"{root.__doc__}\n\nusage: {usage}\n\nkeys (name, type, default, meaning):\n" + "\n".join(lines)


def config_keys(root: type[Any], prefix: str = "") -> dict[str, tuple[str, str, FieldInfo]]:
    """Every key below `root`: its dotted name, with type, default and description.

    Sections under names that the user chooses stand once, under `NAME`.
    """
    keys: dict[str, tuple[str, str, FieldInfo]] = {}
    hints = get_type_hints(root, include_extras=True)
    for name, info in root.__pydantic_fields__.items():
        hint = hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            keys.update(config_keys(hint, f"{prefix}{name}."))
        elif (section := _named_section(hint)) is not None:
            keys.update(config_keys(section, f"{prefix}{name}.{_NAME}."))
        else:
            default = "required" if info.is_required() else yaml.safe_dump(info.default).split("\n")[0]
            keys[prefix + name] = (_type_name(hint), default, info)
    return keys


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, to be saved beside what it produced."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def command_line(root: type[Root], words: Sequence[str], usage: str) -> Root:
    """`load_config` for a program's main function: --help prints the keys, an error ends it with status 2.

    `--plan TARGET` is another way to write `plan.target=TARGET`.
    """
    words = list(words)
    if "--plan" in words[:-1]:
        at = words.index("--plan")
        words[at : at + 2] = [f"plan.target={words[at + 1]}"]
    if not words or {"--help", "-h"} & set(words):
        print(config_help(root, usage))
        sys.exit(0 if words else 2)
    try:
        return load_config(root, words)
    except ConfigError as error:
        print(f"configuration error:\n{error}", file=sys.stderr)
        sys.exit(2)


def _read_yaml(name: str, beside: AnyPath | None, seen: tuple[AnyPath, ...] = ()) -> dict[str, Any]:
    """The values of a file, whose name is relative to the file `beside` that extends it."""
    try:
        path = any_path(name)
        if isinstance(path, Path) and beside is not None and not path.is_absolute():
            path = beside.parent / name
        path = path.resolve()
        if path in seen:
            raise ConfigError(f"{path}: extends itself through {', '.join(p.name for p in seen)}")
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except PathError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    merged = _read_yaml(str(base), path, (*seen, path))
    _merge(merged, tree)
    return merged


def _parse(value: str, word: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{word!r}: the value is not YAML; put it in quotes") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(error: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """One pydantic error as a sentence about a dotted key."""
    # A union's branches stand in the location too; a key's own name never holds their characters.
    parts = [str(part) for part in error["loc"]]
    known = {_with_names(name.split("."), parts): value for name, value in known.items()}
    key = ".".join(parts)
    while key not in known and len(parts) > 1 and error["type"] not in ("unexpected_keyword_argument", "missing"):
        parts.pop()
        key = ".".join(parts)
    if error["type"] == "unexpected_keyword_argument":
        sections = {name.rpartition(".")[0] for name in known} - {""}
        near = difflib.get_close_matches(key, [*known, *sections], n=1, cutoff=0)
        return f"{key}: unknown key; did you mean {near[0]}?"
    if error["type"] == "missing":
        return f"{key}: required"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    expected = f"; expected {known[key][0]}" if key in known else ""
    return f"{key}: {error['msg']}, got {error['input']!r}{expected}"


def _with_names(key: list[str], parts: list[str]) -> str:
    """The dotted key, with the names that a user chose on the way to `parts`."""
    for at, part in enumerate(key):
        if part == _NAME and key[:at] == parts[:at] and at < len(parts):
            key = [*key[:at], parts[at], *key[at + 1 :]]
    return ".".join(key)


def _named_section(hint: Any) -> type[Any] | None:
    """The section of a mapping from names to sections."""
    arguments = get_args(hint)
    found = get_origin(hint) is dict and isinstance(arguments[1], type) and dataclasses.is_dataclass(arguments[1])
    return arguments[1] if found else None


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(a) for a in arguments)
    if origin in (tuple, list):
        return f"list of {_type_name(arguments[0])}"
    return "null" if hint is type(None) else hint.__name__
