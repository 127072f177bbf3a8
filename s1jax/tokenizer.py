"""Reading a model's tokenizer."""

from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TOKENIZER_FILE = "tokenizer.json"


@lru_cache(maxsize=4)
def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id, as its tokenizer.json says; kept, and shared by all that ask for it.

    Raises OSError or ValueError without one.

    Not by `AutoTokenizer` unless there is no such file: that imports torch where it is installed, for a second, and
    cuts texts as the class does that it takes for this kind of model, whatever tokenizer.json says.
    """
    if Path(path).is_dir() and not Path(path, _TOKENIZER_FILE).is_file():
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer
