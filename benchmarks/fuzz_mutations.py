"""How a file is damaged: in its bytes, or in what they mean."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

_WORDS = r"""
null true NaN Infinity -1 1e999 -0.0 0x10 ~ == .. ../ ~/ /dev/zero file:// gs://x/y "\ud800" \u0000 \udfff --- ... <<:
&a *a !!python/object:os.system !!timestamp 2024-02-30 {{ }} {% %} {# #} {%else%} {%endfor%} {%endif%} {{1/0}} {{x.y.z}}
{%for(i)in(range(9**9))%} {%set(x)=9**9**9%} {{'x'*9**12}} {{messages[9].y}} {{raise_exception('no')}} {%include('x')%}
{{''.__class__.__mro__}} {%macro(m)%} {{messages|map('upper')|list}} <|im_start|> <|im_end|> <think> </think> é
"""
_BYTES = [
    *(bytes([value]) for value in (0, 9, 10, 13, 32, 127, 128, 195, 255)),
    *(character.encode() for character in "[]{}()<>:,-./\\\"'#&*!?|%@` "),
    *(word.encode() for word in _WORDS.split()),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xf0\x9f", b"\x00" * 64, b"\n" * 10_000),
    *(b"9" * 400, b"9" * 5000, b"[" * 100_000, b"{" * 100_000, b"(" * 100_000, b"- " * 50_000, b'{"a":' * 20_000),
    b"x" * 300_000,
    b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
]
_NUMBERS = "0 1 -1 2 7 2147483648 9223372036854775808 1e30 0.5 -0.0 1e-320 1e308 NaN Infinity -Infinity"
_TEXTS = """0 1 -1 null nan x <|im_start|> <think> ../x /etc/passwd /dev/zero . file:///x gs://b/x ~nobody * &a BPE
float64 F64 F16 BF16 int8 qwen3 mistral yarn __class__ ( [a- (a+)+$ (?<=a*)b \\ 1e999 é \U0001f600"""
_VALUES: list[Any] = [
    *(None, True, False, 10**30, "", " ", "\0", "\ud800", "\u2028", "a\nb", "x" * 20_000),
    *([], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, [0] * 1000, ["a"] * 1000, [1, "a", None], [[["x"]]]),
    *map(json.loads, _NUMBERS.split()),
    *_TEXTS.split(),
]
_DEEP = 2_000
_UNREADABLE = (OSError, ValueError, LookupError, ArithmeticError, RuntimeError, TypeError, yaml.YAMLError)
"""What reading and writing again may raise of a file that is damaged already; Arrow's errors are among them."""


def mutate(content: bytes, shape: str, rng: random.Random) -> bytes:
    """The content of a file of this shape, damaged in one to four places."""
    structured = _STRUCTURED.get(shape)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        if structured and rng.random() < 0.6:
            # What an earlier place has left may not be readable any more.
            try:
                content = structured(content, rng)
                continue
            except _UNREADABLE:
                pass
        content = _bytes(content, rng)
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    stop = min(stop, start + rng.choice((1, 1, 4, 32, 1 << 20)))
    piece = content[start:stop]
    match rng.randrange(8):
        case 0 if piece:
            return content[:start] + bytes([piece[0] ^ (1 << rng.randrange(8))]) + content[start + 1 :]
        case 1:
            return content[:start] + content[stop:]
        case 2:
            return content[:start] + piece * rng.choice((2, 2, 3, 50)) + content[stop:]
        case 3:
            return content[:start]
        case 4:
            return content[:start] + rng.choice(_BYTES) + content[stop:]
        case 5:
            return content[:start] + rng.randbytes(len(piece)) + content[stop:]
        case 6:
            to = rng.randrange(len(content) + 1)
            return content[:to] + piece + content[to:]
        case _:
            return content[:start] + rng.choice(_BYTES) + content[start:]


def _value(tree: Any, rng: random.Random) -> Any:
    """The tree with one of its values damaged; it is changed in place, too."""
    places: list[tuple[Any, Any]] = []
    waiting, seen = [tree], set[int]()
    while waiting:
        node = waiting.pop()
        # A YAML alias may make a list hold itself.
        if not isinstance(node, dict | list) or id(node) in seen:
            continue
        seen.add(id(node))
        # Not all of a vocabulary: what is around it is as likely.
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        for key in keys if len(keys) < 50 else rng.sample(keys, 50):
            places.append((node, key))
            waiting.append(node[key])
    if not places or rng.random() < 0.02:
        return rng.choice(_VALUES)
    node, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(rng.choice(_VALUES))[:100] if rng.random() < 0.5 else f"{key}x"] = node.pop(key)
        case 2:
            other, at = rng.choice(places)
            # A copy: a tree that holds itself cannot be written.
            node[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
        case 3:
            inner = node[key]
            for _ in range(rng.choice((1, 60, _DEEP))):
                inner = [inner] if rng.random() < 0.5 else {"a": inner}
            node[key] = inner
        case 4 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = rng.choice(
                (-node[key], node[key] + 1, node[key] * 2, str(node[key]), float(node[key]), [node[key]])
            )
        case 5 if isinstance(node[key], str):
            node[key] = _bytes(node[key].encode(errors="replace"), rng).decode(errors=rng.choice(("replace", "ignore")))
        case 6 if isinstance(node, list):
            node += [node[key]] * rng.choice((1, 5, 500))
        case _:
            node[key] = rng.choice(_VALUES)
    return tree


def _json(content: bytes, rng: random.Random) -> bytes:
    text = json.dumps(_value(json.loads(content), rng), ensure_ascii=rng.random() < 0.5)
    return text.encode(errors="surrogatepass")


def _lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        case 1:
            del lines[at]
        case _:
            lines[at] = _json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def _yaml(content: bytes, rng: random.Random) -> bytes:
    tree = _value(yaml.safe_load(content), rng)
    # JSON is YAML, with other texts in it.
    if rng.random() < 0.3:
        return json.dumps(tree).encode()
    return yaml.safe_dump(tree, default_flow_style=rng.random() < 0.3, allow_unicode=True).encode(
        errors="surrogatepass"
    )


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 8, len(content), 10**8 + 1, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + content[8:]
    header = _json(content[8 : 8 + length], rng) if rng.random() < 0.8 else _bytes(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _parquet(content: bytes, rng: random.Random) -> bytes:
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    rows = table.to_pylist()
    match rng.randrange(4):
        case 0:
            name = rng.choice(table.column_names)
            to = rng.choice((pyarrow.binary(), pyarrow.null(), pyarrow.int32(), pyarrow.list_(pyarrow.binary())))
            values = [b"\xff" if to == pyarrow.binary() else None] * len(rows)
            table = table.set_column(table.column_names.index(name), name, pyarrow.array(values, to))
        case 1:
            table = table.rename_columns([rng.choice(table.column_names) for _ in table.column_names])
        case _:
            table = pyarrow.Table.from_pylist([row for row in _value(rows, rng) if isinstance(row, dict)])
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json,
    "lines": _lines,
    "yaml": _yaml,
    "safetensors": _safetensors,
    "parquet": _parquet,
}
