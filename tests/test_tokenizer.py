"""The tokenizer that is read, beside the one that transformers chooses."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from s1jax.tokenizer import load_tokenizer

TEXTS = ["3 + 4 is 7.\n\n", "<|im_start|>think\nWait, <think>é</think>", "  two  spaces\t"]


def test_it_is_the_one_that_transformers_chooses(tokenizer_directory: Path) -> None:
    ours, theirs = load_tokenizer(tokenizer_directory), AutoTokenizer.from_pretrained(tokenizer_directory)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert load_tokenizer(tokenizer_directory) is ours


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
