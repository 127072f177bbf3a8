"""Delimiter profiles: which texts open and close a model's thinking region.

A profile is given as text and tokenised once, with the model's own tokenizer; from there on only ids are
used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Annotated

import numpy as np
from jaxtyping import Bool
from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from transformers import PreTrainedTokenizerBase

from s1jax.model.config_json import read_eos_ids
from s1jax.paths import AnyPath, any_path
from s1jax.plain_yaml import read_yaml
from s1jax.tokenizer import checked_vocabulary, decode, encode


@dataclass(frozen=True)
class DelimiterProfile:
    """Which texts open and close a model's thinking region, and which end its answer.

    A profile either thinks (`start`, `end_tokens`, `end` and `budget_end` are all given) or does not (all
    four are left out: rows answer from their first token on). Raises ValueError, with every problem, for a
    mixture.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    eos: tuple[str, ...]
    """Texts that end the answer; while thinking, each is an end attempt too. One id each."""
    start: str = ""
    """Appended to a prompt that does not hold an open thinking region yet."""
    end_tokens: tuple[str, ...] = ()
    """Texts besides `eos` that are an end attempt when sampled while thinking. One id each."""
    end: str = ""
    """Written when the model ends its thinking."""
    budget_end: str = ""
    """Written when the budget ends it."""
    budget_end_newline: Annotated[bool, Strict()] = False
    """Write a newline before `budget_end`, unless the last thinking token's text already ends in one."""

    def __post_init__(self) -> None:
        problems = []
        if not self.name:
            problems.append("name: is empty")
        for key, texts in (("eos", self.eos), ("end_tokens", self.end_tokens)):
            if "" in texts:
                problems.append(f"{key}: holds an empty text")
        if not self.eos:
            problems.append("eos: is empty, so no answer would ever end; give at least one text")
        delimiters = {
            "start": self.start.strip(),
            "end_tokens": self.end_tokens,
            "end": self.end,
            "budget_end": self.budget_end,
        }
        empty = [key for key, value in delimiters.items() if not value]
        if empty and len(empty) < len(delimiters):
            given = [key for key in delimiters if key not in empty]
            problems.append(
                f"{', '.join(empty)}: empty or missing, though {', '.join(given)} given; a profile needs "
                "all of start, end_tokens, end and budget_end to think, and none of them not to"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def thinks(self) -> bool:
        """Whether rows think before they answer."""
        return bool(self.end_tokens)


_QWEN_EOS = ("<|im_end|>", "<|endoftext|>")

PROFILES: dict[str, DelimiterProfile] = {
    profile.name: profile
    for profile in (
        # s1 paper, section 3.1, and the delimiters of its repository's evaluation.
        DelimiterProfile(
            name="s1",
            eos=_QWEN_EOS,
            start="<|im_start|>think",
            end_tokens=("<|im_start|>",),
            end="<|im_start|>answer",
            budget_end="<|im_start|>answer\nFinal Answer:",
            budget_end_newline=True,
        ),
        # Qwen3 technical report, "thinking budget": the sentence that stops the thinking.
        DelimiterProfile(
            name="qwen3",
            eos=_QWEN_EOS,
            start="<think>\n",
            end_tokens=("</think>",),
            end="</think>",
            budget_end="Considering the limited time by the user, I have to give the solution based on the "
            "thinking directly now.\n</think>\n\n",
        ),
        DelimiterProfile(
            name="deepseek-r1",
            eos=("<｜end▁of▁sentence｜>",),
            start="<think>\n",
            end_tokens=("</think>",),
            end="</think>",
            budget_end="</think>\n\n",
            budget_end_newline=True,
        ),
        DelimiterProfile(name="none", eos=_QWEN_EOS),
    )
}


def load_profile(name_or_path: str | AnyPath) -> DelimiterProfile:
    """Return a built-in profile by name, or the one in a YAML file.

    The file's keys are the fields of `DelimiterProfile`; `name` defaults to the file's own. Raises
    ValueError with all the problems found in the file, FileNotFoundError when there is neither such a
    profile nor a file.
    """
    if str(name_or_path) in PROFILES:
        return PROFILES[str(name_or_path)]
    path = any_path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no delimiter profile {str(name_or_path)!r}: neither a built-in one ({', '.join(PROFILES)}) "
            "nor an existing YAML file"
        )
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"delimiter profile {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"delimiter profile {path}: expected keys and values, found {type(content).__name__}")
    try:
        return TypeAdapter(DelimiterProfile).validate_python({"name": path.stem, **content})
    except ValidationError as error:
        raise ValueError("\n  ".join([f"delimiter profile {path}:", *map(_explain, error.errors())])) from None


def _explain(problem: ErrorDetails) -> str:
    """Return one of pydantic's problems in the words of this project's other errors."""
    key = ".".join(map(str, problem["loc"]))
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"{key}: unknown key; known are {', '.join(f.name for f in fields(DelimiterProfile))}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return str(problem["ctx"]["error"])
    kind = problem["type"].removesuffix("_type")
    expected = {"string": "a text", "tuple": "a list of texts", "bool": "true or false"}.get(kind)
    if expected is None:
        return f"{key}: {problem['msg']}"
    return f"{key}: expected {expected}, found {problem['input']!r:.200}"


@dataclass(frozen=True, eq=False)
class ProfileIds:
    """A profile in one tokenizer's ids. Tables are indexed by id and as long as the model's vocabulary."""

    profile: DelimiterProfile
    start: tuple[int, ...]
    opening: tuple[int, ...]
    """`start` without its trailing white space; what marks a thinking region in a prompt."""
    end: tuple[int, ...]
    budget_end: tuple[int, ...]
    budget_end_with_newline: tuple[int, ...]
    """What is written when the last thinking token does not end in a newline; else it is `budget_end`.

    The same as `budget_end` in a profile without the newline rule.
    """
    end_tokens: tuple[int, ...]
    """Ids that are an end attempt: the profile's end tokens and every eos; empty if it does not think."""
    eos: tuple[int, ...]
    ends_in_newline: Bool[np.ndarray, " vocab"]
    """Ids whose decoded text ends in a newline."""
    valid: Bool[np.ndarray, " vocab"]
    """Ids that the tokenizer has; the others, padding rows of the model's vocabulary, are never emitted."""


@lru_cache(maxsize=16)
def tokenize_profile(profile: DelimiterProfile, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> ProfileIds:
    """Tokenise each delimiter once.

    `vocab_size` is the model's (the length of its logits), which may be larger than the tokenizer's. The result is
    kept, since it takes a tenth of a second for Qwen's ids; so tokens are added to a tokenizer before.
    Raises ValueError when the tokenizer has ids that the model has not, or, with every problem, when an end token or
    eos is not exactly one id, or a text has pieces that the tokenizer does not know.
    """
    vocabulary = checked_vocabulary(tokenizer, vocab_size)
    known = sorted(vocabulary.values())
    problems: list[str] = []

    def encode(key: str, text: str) -> tuple[int, ...]:
        try:
            ids = encode_text(text, tokenizer)
        except ValueError as error:
            problems.append(f"{key}: {error}")
            return ()
        return ids

    def encode_single(key: str, text: str) -> int:
        ids = encode(key, text)
        if len(ids) > 1:
            problems.append(f"{key}: {text!r} is {len(ids)} ids in this tokenizer, {list(ids)}; it must be one")
        return ids[0] if ids else -1

    eos = tuple(encode_single("eos", text) for text in profile.eos)
    end_tokens = tuple(encode_single("end_tokens", text) for text in profile.end_tokens)
    budget_end = encode("budget_end", profile.budget_end)
    start, opening = encode("start", profile.start), encode("start", profile.start.rstrip())
    end = encode("end", profile.end)
    after_newline = budget_end
    if profile.budget_end_newline:
        after_newline = encode("budget_end", "\n" + profile.budget_end)
    if problems:
        raise ValueError(
            "\n  ".join(
                [
                    f"delimiter profile {profile.name!r} does not fit the tokenizer {tokenizer.name_or_path}:",
                    *dict.fromkeys(problems),
                ]
            )
        )

    valid = np.zeros(vocab_size, bool)
    valid[known] = True
    # A newline is one byte, and no part of a longer UTF-8 character, so an id's own text tells even where its other
    # bytes are half a character. Byte-level vocabularies write it as this letter, others as itself or as <0x0A>;
    # looking at these first is several times faster than decoding all of Qwen's 151,665 ids.
    candidates = [i for text, i in vocabulary.items() if text.endswith(("Ċ", "\n", ">"))]
    texts = tokenizer.backend_tokenizer.decode_batch([[i] for i in candidates], skip_special_tokens=False)
    ends_in_newline = np.zeros(vocab_size, bool)
    ends_in_newline[candidates] = [text.endswith("\n") for text in texts]
    return ProfileIds(
        profile=profile,
        start=start,
        opening=opening,
        end=end,
        budget_end=budget_end,
        budget_end_with_newline=after_newline,
        end_tokens=tuple(dict.fromkeys(end_tokens + eos)) if profile.thinks else (),
        eos=eos,
        ends_in_newline=ends_in_newline,
        valid=valid,
    )


def profile_of_model(
    profile: DelimiterProfile, tokenizer: PreTrainedTokenizerBase, directory: AnyPath, vocab_size: int
) -> ProfileIds:
    """`tokenize_profile`, where what the model's generation_config.json names as eos is one too, as in transformers.

    Raises ValueError as that does, and for a generation_config.json that cannot be read.
    """
    ids = tokenize_profile(profile, tokenizer, vocab_size)
    eos = tuple(dict.fromkeys(ids.eos + read_eos_ids(directory)))
    end_tokens = tuple(dict.fromkeys(ids.end_tokens + eos)) if profile.thinks else ()
    return replace(ids, eos=eos, end_tokens=end_tokens)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of a text that is to be forced, without any special token around it.

    Raises ValueError when the tokenizer does not know a piece of it.
    """
    ids = tuple(encode(text, tokenizer))
    # Not by the unknown token's id: Qwen's is <|endoftext|>, which is a delimiter itself.
    if decode(ids, tokenizer) != text:
        raise ValueError(f"the tokenizer does not know {text!r}")
    return ids


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt up to and with its start delimiter, and what of the thinking region it already holds."""

    prompt_ids: tuple[int, ...]
    num_thinking_tokens: int
    ends_in_newline: bool
    """Whether the last thinking token's text ends in a newline; False when there is none yet."""


def prepare_prompt(prompt_ids: Sequence[int], ids: ProfileIds, after_user: int = 0) -> PreparedPrompt:
    """Give the prompt its start delimiter, unless it already holds an open thinking region.

    The rule, on ids: a region is open where the profile's opening occurs and no end token (which any eos
    is) comes after it, so one in an earlier turn, closed by that turn's end, does not count; nor does one before the
    id of number `after_user`, where the user merely names the opening. The region
    starts after the first such occurrence, and after the rest of the start delimiter where exactly that
    follows; what is left of the prompt are its thinking tokens. So with `<think>` and a start of
    `<think>\\n`, a prompt that ends in `<think>` stays as it is. In s1's opening, `<|im_start|>think`, the
    end token it begins with belongs to the opening; a later `<|im_start|>` closes the region.
    """
    prompt = tuple(int(i) for i in prompt_ids)
    if not ids.profile.thinks:
        return PreparedPrompt(prompt, 0, False)
    end_tokens = set(ids.end_tokens)
    last_end = max((i for i, token in enumerate(prompt) if token in end_tokens), default=-1)
    # Where the start delimiter's last piece carries the white space, its ids do not begin with the opening's.
    for begin in range(after_user, len(prompt)):
        for delimiter in (ids.start, ids.opening):
            after = begin + len(delimiter)
            if prompt[begin:after] == delimiter and last_end < after:
                thinking = prompt[after:]
                return PreparedPrompt(prompt, len(thinking), bool(thinking) and bool(ids.ends_in_newline[thinking[-1]]))
    return PreparedPrompt(prompt + ids.start, 0, False)


def num_opened(prompt_ids: Sequence[int], ids: ProfileIds) -> int:
    """Thinking tokens of a prompt that was prepared, those after the last opening in it."""
    prompt = tuple(prompt_ids)
    for begin in reversed(range(len(prompt) if ids.profile.thinks else 0)):
        if any(prompt[begin : begin + len(delimiter)] == delimiter for delimiter in (ids.start, ids.opening)):
            return prepare_prompt(prompt, ids, begin).num_thinking_tokens
    return 0
