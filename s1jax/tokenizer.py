"""Reading a model's tokenizer, and texts with it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from s1jax.paths import AnyPath, BucketPath, any_path
from s1jax.strict_json import check_unicode, parse_json

_TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_JSON_FILES = (_TOKENIZER_FILE, _SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json")
TOKENIZER_FILES = (*_JSON_FILES, _TEMPLATE_FILE, "merges.txt")
_PROBE = "Wait, 3 + 4 is 7.\n"


@lru_cache(maxsize=4)
def load_tokenizer(path: str | AnyPath) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id, as its tokenizer.json says; kept, and shared by all that ask for it.

    Raises OSError or ValueError, which name the file, without one that can be used.

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
            return _load(copy, str(where))
    return _load(str(path), str(path))


def _load(path: str, name: str) -> PreTrainedTokenizerBase:
    """Read the directory at `path`, or a hub id, which people know by this name."""
    local = Path(path).is_dir()
    for file in _JSON_FILES if local else ():
        _check_json(Path(path, file), f"{name}/{file}")
    with _errors_of_library(f"{name}: the tokenizer cannot be read", Path(path, _TOKENIZER_FILE) if local else None):
        if local and not Path(path, _TOKENIZER_FILE).is_file():
            from transformers import AutoTokenizer

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        vocabulary = tokenizer.get_vocab()
        tokenizer.name_or_path = name
    if problem := _unusable(tokenizer, vocabulary):
        raise ValueError(f"{name}: the tokenizer cannot be used: {problem}")
    decode(encode(_PROBE, tokenizer), tokenizer)
    return tokenizer


def _check_json(file: Path, name: str) -> None:
    """Raise ValueError if there is such a file, and it is not an object with text for a template."""
    if not file.is_file():
        return
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected an object, found {content!r:.40}")


def _unusable(tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int]) -> str | None:
    """What no tokenizer may have that the libraries take all the same."""
    template = tokenizer.chat_template
    texts = [*template.values()] if isinstance(template, dict) else [] if template is None else [template]
    if not all(isinstance(text, str) for text in texts):
        return f"chat_template: expected a text, found {template!r:.60}"
    if not vocabulary:
        return "its vocabulary is empty"
    if len(set(vocabulary.values())) < len(vocabulary):
        owners: dict[int, str] = {}
        for token, number in vocabulary.items():
            if owners.setdefault(number, token) != token:
                return f"two tokens, {owners[number]!r:.40} and {token!r:.40}, have the id {number}"
    return None


@contextmanager
def _errors_of_library(what: str, file: Path | None = None) -> Iterator[None]:
    """Make an error of the libraries that read tokenizers a ValueError of one line.

    Theirs are of all kinds: bare Exceptions, KeyErrors for a key that is missing, and panics, which are no Exception.
    `file` is a tokenizer.json to read by itself, to tell whether what is wrong is there.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if file is not None and file.is_file() and not _reads(file):
            what += f", for its {file.name}"
        said = " ".join(str(error).split())
        raise ValueError(f"{what}: {type(error).__name__}: {said:.300}") from None


def _reads(file: Path) -> bool:
    try:
        with _errors_of_library(""):
            Tokenizer.from_file(str(file))
    except ValueError:
        return False
    return True


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text, without any special token around it unless asked for.

    Raises ValueError for a text that is not valid Unicode, or at which the tokenizer fails.
    """
    (ids,) = encode_all([text], tokenizer, add_special_tokens=add_special_tokens)["input_ids"]
    return list(ids)


def encode_all(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_special_tokens: bool = False,
    return_offsets_mapping: bool = False,
) -> BatchEncoding:
    """Several texts at once, as transformers has it, with the place of each id in its text if asked for.

    Raises as `encode` does.
    """
    for text in texts:
        check_unicode(text)
    with _errors_of_library(f"the tokenizer of {tokenizer.name_or_path} fails"):
        # Lengths are checked elsewhere, against the model's context and not the tokenizer's own maximum.
        return tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=return_offsets_mapping,
            verbose=False,
        )


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of these ids, special tokens too, as they are written. Raises ValueError where the tokenizer fails."""
    with _errors_of_library(f"the tokenizer of {tokenizer.name_or_path} fails"):
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def template_file(tokenizer: PreTrainedTokenizerBase) -> str:
    """The file that the chat template is from, for messages."""
    directory = any_path(tokenizer.name_or_path)
    separate = directory / _TEMPLATE_FILE
    return str(separate if separate.is_file() else directory / _SETTINGS_FILE)


def checked_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    """The ids by token. Raises ValueError if a model with so many has no embedding for one of them."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    last = max(vocabulary.values(), default=-1)
    if last >= vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has ids up to {last}, the model's vocabulary only "
            f"{vocab_size}: they do not belong together"
        )
    return vocabulary
