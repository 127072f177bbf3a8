"""From YAML files and `section.key=value` words to a configuration, with errors that name the key.

A word's value is read by the type of its key: where that is a text, it is the text as it stands. The help text is made
from the dataclasses of `config`, so a key exists in one place only.
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
from s1jax.plain_yaml import parse_yaml, read_yaml

Root = TypeVar("Root")
_NAME = "NAME"
_LISTED_PROBLEMS = 50
_MOST_PARTS = 20
"""Of a dotted key."""
_LONGEST_PATH = 4096
_LONGEST_NAME = 200
"""Of a mistaken key, in characters: what it is compared by, and what is shown of it."""
_WORDS_HELP = """\
A value of type str is the text as it stands, spaces included; null or ~ is null where the type has null. A list of
texts is written [a, "b c"], other values as in YAML."""


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
            _merge(tree, _nested(key, _value_of(word, value, _hint(root, key.split(".")))))
        elif word.endswith((".yaml", ".yml")):
            _merge(tree, _read_file(word, None))
        else:
            raise ConfigError(f"{word!r} is neither a YAML file nor key=value")
    try:
        return TypeAdapter(root).validate_python(tree)
    except ValidationError as error:
        known = config_keys(root)
        errors = error.errors()[:_LISTED_PROBLEMS]
        # Of a union that a value is not of, one branch is enough: the type is named whole.
        problems = sorted(dict(_explain(error, known) for error in reversed(errors)).values())
        if error.error_count() > len(errors):
            problems.append(f"... and {error.error_count() - len(errors)} more")
        raise ConfigError("\n".join(problems)) from None


def config_help(root: type[Any], usage: str) -> str:
    """The help text of a command: every key with its type, default and meaning."""
    rows = [(key, kind, default, info.description or "") for key, (kind, default, info) in config_keys(root).items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"  {key:<{widths[0]}}  {kind:<{widths[1]}}  {default:<{widths[2]}}  {text}"
        for key, kind, default, text in rows
    ]
    head = f"{root.__doc__}\n\nusage: {usage}\n\nkeys (name, type, default, meaning):"
    return "\n".join([head, *lines, "", _WORDS_HELP])


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


def _read_file(name: str, beside: AnyPath | None, seen: tuple[AnyPath, ...] = ()) -> dict[str, Any]:
    """The values of a file, whose name is relative to the file `beside` that extends it."""
    try:
        path = any_path(name)
        if isinstance(path, Path) and beside is not None and not path.is_absolute():
            path = beside.parent / name
        path = path.resolve()
    except PathError as error:
        raise ConfigError(str(error)) from None
    except RuntimeError:
        raise ConfigError(f"{name}: a symbolic link that leads to itself") from None
    if path in seen:
        raise ConfigError(f"{path}: extends itself through {', '.join(p.name for p in seen)}")
    try:
        tree = read_yaml(path)
    except PathError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values")
    if "extends" not in tree:
        return tree
    base = tree.pop("extends")
    if not isinstance(base, str) or not 0 < len(base) <= _LONGEST_PATH or "\0" in base:
        raise ConfigError(f"{path}: extends: expected the path of a YAML file, found {base!r:.60}")
    merged = _read_file(base, path, (*seen, path))
    _merge(merged, tree)
    return merged


def _hint(root: type[Any], parts: Sequence[str]) -> Any:
    """The type of a dotted key, or Any where there is no such key: what is wrong with it is told later."""
    hint: Any = root
    for part in parts:
        while get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            hint = get_type_hints(hint, include_extras=True).get(part, Any)
        elif get_origin(hint) is dict:
            hint = get_args(hint)[1]
        else:
            return Any
    return hint


def _kinds(hint: Any) -> list[Any]:
    """The types that a value of this type may have: those of a union, and without annotations."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for argument in get_args(hint) for kind in _kinds(argument)]
    return [hint]


def _value_of(word: str, value: str, hint: Any) -> Any:
    """The value that a word's text has for a key of this type.

    Raises ConfigError if it is neither what the type takes as it stands nor YAML.
    """
    try:
        word.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{word!r:.60}: not valid Unicode") from None
    kinds = _kinds(hint)
    if type(None) in kinds and value in ("null", "~"):
        return None
    of_texts = [kind for kind in kinds if get_origin(kind) in (tuple, list) and str in _kinds(get_args(kind)[0])]
    if of_texts and value.startswith("["):
        return _parse(word, value, only_texts=True)
    if str in kinds or of_texts or any(value in get_args(kind) for kind in kinds if get_origin(kind) is Literal):
        return value
    return _parse(word, value)


def _parse(word: str, value: str, only_texts: bool = False) -> Any:
    if "\n" in value or "\r" in value:
        # YAML would make a space of it.
        raise ConfigError(f'{word!r:.60}: a line break in a value that is not one text; in a list write it "\\n"')
    try:
        return parse_yaml(value, only_texts=only_texts)
    except ValueError as error:
        reason = str(error).removeprefix("not valid YAML: ")
        raise ConfigError(f"{word!r:.60}: the value is not YAML, which this key's type wants: {reason}") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    parts = key.split(".")
    if len(parts) > _MOST_PARTS:
        raise ConfigError(f"{key:.60}...: unknown key of {len(parts)} parts")
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(tree: dict[Any, Any], other: Mapping[Any, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _explain(error: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, str]:
    """The dotted key that a pydantic error is about, and a sentence about it."""
    # A union's branches stand in the location too; a key's own name never holds their characters.
    parts = [str(part) for part in error["loc"]]
    known = {_with_names(name.split("."), parts): value for name, value in known.items()}
    key = ".".join(parts)
    while key not in known and len(parts) > 1 and error["type"] not in ("unexpected_keyword_argument", "missing"):
        parts.pop()
        key = ".".join(parts)
    shown = key[:_LONGEST_NAME]
    if error["type"] == "unexpected_keyword_argument":
        sections = {name.rpartition(".")[0] for name in known} - {""}
        near = difflib.get_close_matches(shown, [*known, *sections], n=1, cutoff=0)
        return key, f"{shown}: unknown key; did you mean {near[0]}?"
    if error["type"] == "missing":
        return key, f"{shown}: required"
    if error["type"] == "value_error":
        return key, f"{shown}: {error['ctx']['error']}"
    expected = f"; expected {known[key][0]}" if key in known else ""
    return key, f"{shown}: {error['msg']}, got {error['input']!r:.200}{expected}"


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
