"""Reading a model's tokenizer."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from s1jax.paths import AnyPath, BucketPath, any_path

_TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    _TOKENIZER_FILE,
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@lru_cache(maxsize=4)
def load_tokenizer(path: str | AnyPath) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id, as its tokenizer.json says; kept, and shared by all that ask for it.

    Raises OSError or ValueError without one.

    Not by `AutoTokenizer` unless there is no such file: that imports torch where it is installed, for a second, and
    cuts texts as the class does that it takes for this kind of model, whatever tokenizer.json says.
    """
    where = any_path(path)
    if isinstance(where, BucketPath):
        with TemporaryDirectory() as copy:
            for file in where.iterdir():
                if file.name in TOKENIZER_FILES:
                    Path(copy, file.name).write_bytes(file.read_bytes())
            if not any(Path(copy).iterdir()):
                raise FileNotFoundError(f"{where}: holds no tokenizer ({_TOKENIZER_FILE})")
            return _load(copy)
    return _load(str(path))


def _load(path: str) -> PreTrainedTokenizerBase:
    if Path(path).is_dir() and not Path(path, _TOKENIZER_FILE).is_file():
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def check_vocabulary(vocabulary: Mapping[str, int], vocab_size: int) -> None:
    """Raise ValueError if a tokenizer's vocabulary has ids for which a model with so many has no embedding."""
    last = max(vocabulary.values())
    if last >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {last}, the model's vocabulary only {vocab_size}: they do not belong together"
        )
