"""YAML files: what cannot be used is refused in one line that names the file, in bounded time and memory."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from s1jax.config import GenerateConfig
from s1jax.config_reader import ConfigError, load_config
from s1jax.curation.config import CurateConfig
from s1jax.decoding.profiles import load_profile
from s1jax.plain_yaml import parse_yaml

LAUGHS = "a0: &a0 ha\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(12))
MERGED = "a0: &a0 {k: ha}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: *a{i}, x{i}: *a{i}, y{i}: *a{i}}}\n" for i in range(40)
)

BROKEN = [
    (b"model: {path: \xff}", "not UTF-8: invalid start byte at byte 15"),
    ("model: {path: m}".encode("utf-16"), "not UTF-8"),
    (b"[" * 100_000, "nested deeper than 50 levels"),
    (b"{" * 100_000, "nested deeper than 50 levels"),
    (b"- " * 100_000, "nested deeper than 50 levels"),
    (b"? " * 100_000, "nested deeper than 50 levels"),
    (b"a: {" * 50_000, "nested deeper than 50 levels"),
    (LAUGHS.encode(), "more than 5000 values"),
    (MERGED.encode(), "more than 5000 values"),
    (b"model: &m {path: *m}", "*m stands for nothing that was whole before it at line 1, column 18"),
    (b"model: *m", "*m stands for nothing"),
    (b"model:\n\tpath: m", "found character '\\t' that cannot start any token at line 2, column 1"),
    (b"model: {path: m}\nmodel: {path: n}", "the key 'model' stands twice at line 2, column 1"),
    (b"model: {path: m, path: n}", "the key 'path' stands twice at line 1, column 18"),
    (b"1: a\n1: b", "the key 1 stands twice"),
    (b"model: {<<: m, path: n}", "<< takes one mapping"),
    (b"model: {? [a]: b}", "a key is a list or a mapping"),
    (b"model: !!timestamp 2024-01-01", "the tag tag:yaml.org,2002:timestamp is not supported"),
    (b"model: !!python/object/apply:os.getcwd []", "is not supported at line 1, column 8"),
    (b"model: !!int m", "is not supported"),
    (b'model: {path: "\\ud800"}', "not valid Unicode"),
    (b"model: {path: a\0b}", "character 16 is #x0000"),
    (b"model: [a", "not valid YAML: "),
    (b"model: 'a", "not valid YAML: "),
    (b"a: b: c", "mapping values are not allowed here"),
    (b"--- {}\n--- {}", "a second document begins"),
    (b"%YAML 3.0\n--- {}", "incompatible YAML document"),
    (b"- a", "expected keys and values"),
    (b"42", "expected keys and values"),
    (b"extends: 3", "extends: expected the path of a YAML file, found 3"),
    (b"extends: [base.yaml]", "extends: expected the path of a YAML file"),
    (b"extends: {a: b}", "extends: expected the path of a YAML file"),
    (b"extends:", "extends: expected the path of a YAML file, found None"),
    (b"extends: ''", "extends: expected the path of a YAML file"),
    (b"extends: true", "extends: expected the path of a YAML file, found True"),
    (b'extends: "a\\0b"', "extends: expected the path of a YAML file"),
    (b"extends: gone.yaml", "gone.yaml: No such file or directory"),
    (b"extends: .", "Is a directory"),
    (b"#" * 300_000, "larger than 262144 bytes"),
    (b"a: " + b"[x, " * 10 + b"x, " * 80_000, "more than 5000 values"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_file_that_cannot_be_used_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_config(GenerateConfig, [str(path), "model.path=m"])
    assert time.process_time() - started < 20
    assert str(error.value).startswith(str(tmp_path))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(("content", "message"), BROKEN[:28], ids=range(28))
def test_a_profile_is_read_in_the_same_way(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.yaml: ") as error:
        load_profile(path)
    assert message in str(error.value) or message == "expected keys and values"
    assert len(str(error.value).splitlines()) == 1


def test_what_is_set_in_one_place_of_an_alias_stays_there(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: o\nsources: {math: {path: s}}\nevaluation_sets: {}\n"
        "students: {a: {endpoint: &e {model: m}}, b: {endpoint: *e}}\n"
    )
    config = load_config(CurateConfig, [str(path), "students.b.endpoint.model=n"])
    assert [config.students[name].endpoint.model for name in ("a", "b")] == ["m", "n"]


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"loop\.yaml: "):
        load_config(GenerateConfig, [str(path)])


@pytest.mark.parametrize("content", [LAUGHS, MERGED, "[" * 200_000, "k: 1\n" * 40_000])
def test_a_small_file_takes_little_memory(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    script = (
        "from s1jax.config import GenerateConfig; from s1jax.config_reader import load_config, ConfigError\n"
        "import resource, sys; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_config(GenerateConfig, sys.argv[1:])\n"
        "except ConfigError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, path], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    kilobytes = int(result.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 100_000


def test_many_unknown_keys_are_not_all_compared(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"key{i}: 1\n" for i in range(2_000)))
    with pytest.raises(ConfigError) as error:
        load_config(GenerateConfig, [str(path), "model.path=m"])
    lines = str(error.value).splitlines()
    assert len(lines) == 51
    assert lines[-1] == "... and 1950 more"


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc: #-'\"", max_size=4), inner, max_size=4),
    max_leaves=15,
)


@given(value=PLAIN, flow=st.booleans())
def test_what_yaml_writes_is_read_as_it_was(value: Any, flow: bool) -> None:
    if isinstance(value, dict):
        value.pop("<<", None)
    assert parse_yaml(yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)) == value


@given(text=st.text("ab1:-?,[]{}#&*!|>'\"%@` \n\t~<.", max_size=40))
def test_any_text_is_read_as_yaml_does_or_refused_in_one_line(text: str) -> None:
    try:
        ours = parse_yaml(text)
    except ValueError as error:
        message = str(error)
    else:
        # BaseLoader leaves every text as it is; what numbers are is tested below.
        assert shape(ours) == shape(yaml.load(text, yaml.BaseLoader))
        return
    assert "\n" not in message


def shape(value: Any) -> Any:
    """A value with every text, number, true, false and null in it as the same."""
    if isinstance(value, dict):
        return [shape(part) for part in value.values()]
    return [shape(part) for part in value] if isinstance(value, list) else "scalar"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-02-30", "2024-02-30"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1_000", 1000),
        ("1e-4", "1e-4"),
        ("1.5e-4", 1.5e-4),
        ("-.5", -0.5),
        ("Yes", True),
        ("yEs", "yEs"),
        ("~", None),
        ("!!str 42", "42"),
        ("! 42", "42"),
        ("'42'", "42"),
        ("|\n 42\n", "42\n"),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, l: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}),
        ("", None),
        ("# nothing", None),
    ],
)
def test_what_a_text_means(text: str, value: Any) -> None:
    assert parse_yaml(text) == value
