"""Words on the command line: a text arrives as it was written, all else is what its type says, or refused."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1jax.config import EvaluateConfig, GenerateConfig, ScoreConfig
from s1jax.config_reader import ConfigError, config_keys, load_config
from s1jax.curation.config import CurateConfig
from s1jax.training.config import TrainConfig

REQUIRED = {
    ScoreConfig: ["model.path=m", "input=i", "output=o"],
    GenerateConfig: ["model.path=m"],
    EvaluateConfig: ["model.path=m", "tasks=t", "output_dir=o"],
    TrainConfig: ["model.path=m", "data.path=d", "training.output_dir=o"],
    CurateConfig: ["output_dir=o", "sources.math.path=s", "evaluation_sets.math.path=s", "students.math.path=m"],
}


def read(root: type[Any], key: str, word: str) -> Any:
    """The value of `key` after `key=word`."""
    value = load_config(root, [*REQUIRED[root], f"{key}={word}"])
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


TEXT_KEYS = [
    (root, key.replace("NAME", "math"))
    for root in REQUIRED
    for key, (kind, _, _) in config_keys(root).items()
    # A benchmark needs a path beside its other keys.
    if kind in ("str", "str|null") and (key == "select.benchmarks.NAME.path" or "benchmarks" not in key)
]


QUESTIONS = [
    "Item # 5 costs what?",
    "Question: how many?",
    "42",
    "3.0",
    "010",
    "1:30",
    "2024-02-30",
    "yes",
    "off",
    "{1, 2} is a set, and [1, 2]?",
    "[1, 2] is a list?",
    "- a\n- b",
    " leading and trailing \n",
    "\ttab",
    "'quoted'",
    '"half',
    "&a *b !c %d @e `f",
    "a=b=c",
    "",
    "né 数 🙂",
    "[not closed",
    "|\n block",
    "? key\n: value",
    "NULL",
    " null",
]


@pytest.mark.parametrize("word", QUESTIONS)
@pytest.mark.parametrize("key", ["prompt", "budget.profile", "model.path", "output"])
def test_a_text_is_the_word_as_it_stands(key: str, word: str) -> None:
    assert read(GenerateConfig, key, word) == word


@settings(max_examples=200)
@given(place=st.sampled_from(TEXT_KEYS), word=st.text().filter(lambda word: "://" not in word))
def test_every_key_of_type_text_takes_every_word(place: tuple[type[Any], str], word: str) -> None:
    assert read(*place, word) == word or word in ("null", "~")


@pytest.mark.parametrize("word", ["null", "~"])
def test_null_is_null_where_the_type_has_it_and_else_a_text(word: str) -> None:
    assert read(GenerateConfig, "prompt", word) is None
    assert read(GenerateConfig, "budget.max_thinking_tokens", word) is None
    assert read(GenerateConfig, "model.param_dtype", word) is None
    assert read(CurateConfig, "sources.math.answer", word) is None
    assert read(GenerateConfig, "budget.profile", word) == word
    assert read(GenerateConfig, "budget.wait", word) == word
    assert read(CurateConfig, "students.math.instruction", word) == word
    assert read(EvaluateConfig, "tasks", word) == (word,)


WAITS = [
    (" Wait", " Wait"),
    ("Wait\n", "Wait\n"),
    ("Wait, let me check: 5 # 3", "Wait, let me check: 5 # 3"),
    ("42", "42"),
    ("yes", "yes"),
    ("{a}", "{a}"),
    ("", ""),
    ("[Wait, Hmm]", ("Wait", "Hmm")),
    ("[' Wait', \"Hmm\\n\"]", (" Wait", "Hmm\n")),
    ("[yes, 42, null, 2024-02-30]", ("yes", "42", "null", "2024-02-30")),
    ("['[pause]']", ("[pause]",)),
    ("[]", ()),
]


@pytest.mark.parametrize(("word", "value"), WAITS)
def test_a_wait_text_or_a_list_of_them(word: str, value: str | tuple[str, ...]) -> None:
    assert read(GenerateConfig, "budget.wait", word) == value
    assert read(EvaluateConfig, "sweep.wait", word) == ((value,) if isinstance(value, str) else value)


@pytest.mark.parametrize("key", ["tasks", "sources.math.metadata", "filter.asy_sources"])
@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("a.jsonl,aime24", ("a.jsonl", "aime24")),
        ("2024", ("2024",)),
        ("2024, yes", ("2024", "yes")),
        ("['a,b', c: d]", None),
        ("['a,b', \"c: d\"]", ("a,b", "c: d")),
    ],
)
def test_a_list_of_texts_by_commas_or_in_brackets(key: str, word: str, value: tuple[str, ...] | None) -> None:
    root = EvaluateConfig if key == "tasks" else CurateConfig
    if value is None:
        with pytest.raises(ConfigError, match=key):
            read(root, key, word)
    else:
        assert read(root, key, word) == value


@pytest.mark.parametrize(
    ("root", "key", "word", "value"),
    [
        (GenerateConfig, "batch_size", "16", 16),
        (GenerateConfig, "batch_size", "1_000", 1000),
        (GenerateConfig, "sampling.temperature", "1e-1", 0.1),
        (GenerateConfig, "sampling.temperature", "0", 0.0),
        (GenerateConfig, "logprobs", "yes", True),
        (GenerateConfig, "logprobs", "false", False),
        (GenerateConfig, "budget.max_thinking_tokens", "auto", "auto"),
        (GenerateConfig, "budget.max_thinking_tokens", "7", 7),
        (TrainConfig, "model.remat", "none", "none"),
        (TrainConfig, "model.remat_by_length", "{8192: heads, 16384: gate}", {8192: "heads", 16384: "gate"}),
        (EvaluateConfig, "sweep.max_thinking_tokens", "0,256,auto", (0, 256, "auto")),
        (EvaluateConfig, "sweep.max_thinking_tokens", "[0, auto]", (0, "auto")),
        (EvaluateConfig, "sweep.num_ignore", "2", (2,)),
        (CurateConfig, "distill.endpoint.extra_body", "{stop: ['a b'], n: 1}", {"stop": ["a b"], "n": 1}),
        (CurateConfig, "distill.endpoint.extra_body.temperature", "0.5", 0.5),
        (CurateConfig, "sources.math.limit", "10", 10),
        (CurateConfig, "sources.math.answer_after", "####", "####"),
    ],
)
def test_other_values_are_read_by_their_type(root: type[Any], key: str, word: str, value: Any) -> None:
    assert read(root, key, word) == value


@pytest.mark.parametrize(
    ("root", "key", "word"),
    [
        (GenerateConfig, "batch_size", "010"),
        (GenerateConfig, "batch_size", "1:30"),
        (GenerateConfig, "batch_size", "0x10"),
        (GenerateConfig, "batch_size", "1e1"),
        (GenerateConfig, "batch_size", "16.0"),
        (GenerateConfig, "batch_size", "'16'"),
        (GenerateConfig, "batch_size", "1\n6"),
        (GenerateConfig, "batch_size", ""),
        (GenerateConfig, "batch_size", "9" * 5000),
        (GenerateConfig, "sampling.temperature", "nan"),
        (GenerateConfig, "sampling.temperature", ".inf"),
        (GenerateConfig, "sampling.temperature", "1.0x"),
        (GenerateConfig, "logprobs", "maybe"),
        (GenerateConfig, "model", "null"),
        (GenerateConfig, "model", "m"),
        (GenerateConfig, "budget.max_thinking_tokens", "010"),
        (GenerateConfig, "budget.max_thinking_tokens", "-1"),
        (GenerateConfig, "budget.wait", "[Wait, Hmm"),
        (GenerateConfig, "budget.wait", "[Wait], then"),
        (GenerateConfig, "budget.wait", "['Wait\n']"),
        (GenerateConfig, "budget.wait", "[[Wait]]"),
        (EvaluateConfig, "sweep.max_thinking_tokens", "1,000"),
        (EvaluateConfig, "sweep.max_thinking_tokens", "1,,2"),
        (EvaluateConfig, "sweep.max_thinking_tokens", "[1, yes]"),
        (EvaluateConfig, "sweep.baselines", "rejections"),
        (TrainConfig, "model.remat_by_length", "{8192: heads, 8192: gate}"),
        (TrainConfig, "model.remat_by_length", "{yes: heads}"),
        (CurateConfig, "distill.endpoint.extra_body", '{stop: "a\nb"}'),
        (CurateConfig, "distill.endpoint.extra_body", "[" * 100_000),
        (GenerateConfig, "prompt", "half \udcff of a character"),
        (GenerateConfig, "prompts.x", "3"),
        (GenerateConfig, ".".join("a" * 5000), "3"),
        (GenerateConfig, "k" * 100_000, "3"),
        (GenerateConfig, "", "3"),
    ],
)
def test_what_is_not_of_the_type_is_refused_in_one_line(root: type[Any], key: str, word: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(root, [*REQUIRED[root], f"{key}={word}"])
    assert key.split(".")[0][:20] in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 101_000
