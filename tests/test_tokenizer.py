"""The tokenizer that is read, beside the one that transformers chooses."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from s1jax.tokenizer import load_tokenizer
from tests import tiny

TEXTS = [
    "3 + 4 is 7.\n\n",
    "12 * 5 = 60.\nWe'll see: 3,000",
    "<|im_start|>think\nWait, <think>é</think>",
    "  two  spaces\t",
]


def test_it_is_the_one_that_transformers_chooses(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model")
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert type(ours) is not type(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert load_tokenizer(directory) is ours


def test_reading_it_does_not_import_torch(tokenizer_directory: Path) -> None:
    pytest.importorskip("torch", reason="torch is a test dependency on Python 3.11 only")
    program = (
        "import sys\nfrom s1jax.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(tokenizer_directory)!r})\nprint('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path)
