"""Headers of safetensors files: what describes no whole file is refused in one line, in bounded time."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from s1jax.model.safetensors_files import read_header

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.zeros(0, np.int8)}


def write(path: Path, header: Any, tail: int = 32) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(tail))
    return path


def entry(start: Any = 0, stop: Any = 32, shape: Any = (8,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in header.items()} == {k: v.shape for k, v in TENSORS.items()}
    np.testing.assert_array_equal(header["a"].read_rows(0, 2), TENSORS["a"])
    assert read_header(write(tmp_path / "empty.safetensors", {}, 0)) == {}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 50_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
        (b"{", "not JSON"),
        (b'{"a": {}, "a": {}}', "'a' stands twice"),
        ([], "does not describe tensors"),
        ({"__metadata__": []}, "expected texts by name"),
        ({"__metadata__": {"format": 3}}, "expected texts by name"),
        ({"a": 3}, "does not describe tensors: a has"),
        ({"a": entry(stop=10**30)}, "does not describe tensors"),
        ({"a": entry(start=-1)}, "does not describe tensors"),
        ({"a": entry(start=0.0)}, "does not describe tensors"),
        ({"a": entry(start=True)}, "does not describe tensors"),
        ({"a": entry(shape=[-8])}, "does not describe tensors"),
        ({"a": entry(shape=8)}, "does not describe tensors"),
        ({"a": entry(shape=[2**59] * 100_000)}, "does not describe tensors"),
        ({"a": entry(dtype=["F32"])}, "does not describe tensors"),
        ({"a": entry(data_offsets=[0])}, "does not describe tensors"),
        ({"a": entry(shape=[2**30, 2**30])}, "32 bytes, 4,611,686,018,427,387,904 by its shape"),
        ({"a": entry(shape=[4])}, "a: 32 bytes, 16 by its shape"),
        ({"a": entry(32, 0, dtype="I8")}, "a: -32 bytes"),
        ({"a": entry(0, 16, [4])}, "bytes, "),
        ({"a": entry(), "b": entry()}, "b: begins at byte "),
        ({"a": entry(0, 20, [5]), "b": entry(16, 32, [4])}, "b: begins at byte "),
        ({"a": entry(4, 32, [7])}, "a: begins at byte "),
        ({"a": entry(0, 64, [16])}, "bytes, "),
        ({}, "bytes, "),
    ],
    ids=range(27),
)
def test_a_header_that_does_not_describe_the_file(header: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_header(write(tmp_path / "x.safetensors", header))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("length", [33, 10**8 + 1, 2**40, 2**64 - 1])
def test_a_header_longer_than_its_file_or_than_any_is_not_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{" * 32)
    with path.open("r+b") as file:
        file.truncate(2 * 10**8 if length == 10**8 + 1 else 40)
    with pytest.raises(ValueError, match="a header of "):
        read_header(path)
