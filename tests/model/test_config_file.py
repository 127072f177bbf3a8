"""config.json as a file: what is no JSON is refused in one line, and sizes are held against the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from s1jax.config import DecodingMeshSection, GenerateConfig, ModelSection
from s1jax.decoding.setup import prepare
from s1jax.model.config import QwenConfig, UnsupportedConfigError
from s1jax.model.hf import CheckpointError
from s1jax.model.load import load_model
from tests.tiny import QWEN2, model_directory

GOOD = json.dumps(QWEN2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON: Expecting value"),
        (GOOD[:-5].encode(), "not JSON: "),
        (b'{"model_type": "qw\xffn2"}', "not UTF-8: invalid start byte at byte 19"),
        (GOOD.encode("utf-16"), "not UTF-8: "),
        (GOOD.encode("utf-8-sig"), "not JSON: Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"rope_scaling": ' * 100_000, "nested too deeply"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b"null", "expected a JSON object, found None"),
        (GOOD.replace("{", '{"vocab_size": 9, ', 1).encode(), "the key 'vocab_size' stands twice"),
        (GOOD.replace("10000.0", "NaN").encode(), "NaN is not a number"),
        (GOOD.replace("10000.0", "-Infinity").encode(), "-Infinity is not a number"),
        (GOOD.replace("10000.0", "1e999").encode(), "rope_theta is inf, expected a positive number"),
        (GOOD.replace("10000.0", "1" * 5000).encode(), "4300 digits"),
        (GOOD.replace("10000.0", '{"__float__": "Infinity"}').encode(), "rope_theta is an object, expected"),
    ],
    ids=range(15),
)
def test_a_file_that_is_no_config_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedConfigError) as error:
        QwenConfig.from_directory(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Against the checkpoint, before anything of such a size is built


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("sizes") / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers is 1000000000, expected a positive integer up to"),
        ({"num_hidden_layers": 999}, "config.json has num_hidden_layers 999, there are tensors of 3"),
        ({"vocab_size": 2**31 - 1}, "model.embed_tokens.weight has shape [384, 64], config.json implies [2147483647"),
        ({"hidden_size": 1_000_000}, "model.embed_tokens.weight has shape [384, 64], config.json implies [384, 10000"),
    ],
)
def test_sizes_are_those_of_the_checkpoint(changes: dict, message: str, directory: Path, tmp_path: Path) -> None:
    copy_of = Path(shutil.copytree(directory, tmp_path / "model"))
    hf = json.loads((copy_of / "config.json").read_text())
    (copy_of / "config.json").write_text(json.dumps({**hf, "head_dim": 16, **changes}))
    section = ModelSection(path=str(copy_of))
    for start in (lambda: prepare(GenerateConfig(section)), lambda: load_model(section, DecodingMeshSection())):
        with pytest.raises((UnsupportedConfigError, CheckpointError)) as error:
            start()
        assert str(copy_of) in str(error.value)
        assert message in str(error.value)
