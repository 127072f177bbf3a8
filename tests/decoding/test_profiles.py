import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from s1jax.decoding.profiles import (
    PROFILES,
    DelimiterProfile,
    load_profile,
    prepare_prompt,
    tokenize_profile,
)
from tests import tiny

PIECES = [
    "<unk>", "\n\n", "\n", ".\n", " a", " b", " c", " d", "Wait", " Hmm", "think", "answer", "Final Answer:",
    "hi", "user", "assistant", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>",
    "<｜end▁of▁sentence｜>", PROFILES["qwen3"].budget_end.split("\n")[0],
]  # fmt: skip
HOLE = 5
"""An id in the middle of the vocabulary that no piece has."""
VOCAB_SIZE = 32
"""That of a model with padding rows after the tokenizer's ids."""


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with each of PIECES as one id, and nothing else."""
    ids = {piece: i if i < HOLE else i + 1 for i, piece in enumerate(PIECES)}
    dictionary = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    escaped = [piece.replace("|", r"\|").replace(".", r"\.") for piece in PIECES]
    dictionary.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(escaped)), behavior="isolated")
    dictionary.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=dictionary, unk_token="<unk>")


TOKENIZER = piece_tokenizer()
IDS = {name: tokenize_profile(profile, TOKENIZER, VOCAB_SIZE) for name, profile in PROFILES.items()}


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def qwen_like(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_pieces_are_one_id_each():
    text = "".join(PIECES[1:])
    assert len(encode(text)) == len(PIECES) - 1
    assert TOKENIZER.decode(encode(text)) == text


@pytest.mark.parametrize("name", ["s1", "qwen3", "none"])
def test_delimiters_decode_to_their_texts(qwen_like, name):
    profile = PROFILES[name]
    ids = tokenize_profile(profile, qwen_like, 512)
    newline = "\n" if profile.budget_end_newline else ""
    for tokens, text in (
        (ids.start, profile.start),
        (ids.opening, profile.start.rstrip()),
        (ids.end, profile.end),
        (ids.budget_end, profile.budget_end),
        (ids.budget_end_with_newline, newline + profile.budget_end),
    ):
        assert qwen_like.decode(tokens) == text
    assert [qwen_like.decode([i]) for i in ids.eos] == list(profile.eos)
    expected = [*profile.end_tokens, *profile.eos] if profile.thinks else []
    assert [qwen_like.decode([i]) for i in ids.end_tokens] == expected


def test_tables_follow_the_tokenizer(qwen_like):
    vocab_size = len(qwen_like) + 40
    ids = tokenize_profile(PROFILES["s1"], qwen_like, vocab_size)
    np.testing.assert_array_equal(ids.valid, np.arange(vocab_size) < len(qwen_like))
    # In byte-level BPE, "Ċ" stands for the newline byte; CORPUS ends its lines in one and in two.
    pieces = qwen_like.convert_ids_to_tokens(list(range(len(qwen_like))))
    expected = [piece.endswith("Ċ") for piece in pieces] + [False] * 40
    assert ids.ends_in_newline.tolist() == expected
    assert sum(expected) > 1


def test_holes_in_the_vocabulary_are_not_valid():
    assert np.flatnonzero(~IDS["s1"].valid).tolist() == [HOLE, *range(len(PIECES) + 1, VOCAB_SIZE)]
    assert [TOKENIZER.decode([i]) for i in np.flatnonzero(IDS["s1"].ends_in_newline)] == ["\n\n", "\n", ".\n"]


def test_end_tokens_and_eos_of_several_ids_are_refused_together(qwen_like):
    profile = DelimiterProfile(
        "mine",
        eos=("<|im_end|>", "the sum"),
        start="<think>",
        end_tokens=("</thinking>",),
        end=".",
        budget_end=".",
    )
    with pytest.raises(ValueError, match="'mine' does not fit the tokenizer") as error:
        tokenize_profile(profile, qwen_like, 512)
    assert "eos: 'the sum' is 2 ids" in str(error.value)
    assert "end_tokens: '</thinking>' is" in str(error.value)
    assert "<|im_end|>" not in str(error.value)


def test_unknown_pieces_are_refused():
    profile = DelimiterProfile(
        "mine", eos=("<eos>",), start="<think>", end_tokens=("</think>",), end="</think>", budget_end="stop"
    )
    with pytest.raises(ValueError, match="budget_end: the tokenizer does not know 'stop'") as error:
        tokenize_profile(profile, TOKENIZER, VOCAB_SIZE)
    assert "eos: the tokenizer does not know '<eos>'" in str(error.value)


def test_ids_past_the_models_vocabulary_are_refused(qwen_like):
    with pytest.raises(ValueError, match=r"has ids up to 367, the model's vocabulary only 367"):
        tokenize_profile(PROFILES["qwen3"], qwen_like, len(qwen_like) - 1)


def test_deepseek_r1_needs_its_own_eos(qwen_like):
    with pytest.raises(ValueError, match="eos: '<｜end▁of▁sentence｜>' is"):
        tokenize_profile(PROFILES["deepseek-r1"], qwen_like, 512)
    assert [TOKENIZER.decode([i]) for i in IDS["deepseek-r1"].eos] == ["<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize(
    ("name", "prompt", "start", "thinking"),
    [
        ("none", "hi", "", ""),
        ("s1", "hi", "<|im_start|>think", ""),
        ("s1", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>think", ""),
        ("s1", "hi<|im_start|>think", "", ""),
        ("s1", "hi<|im_start|>think\n a", "", "\n a"),
        # A region that an earlier turn opened and closed, by either end token.
        ("s1", "<|im_start|>think a<|im_start|>answer b<|im_end|>\n", "<|im_start|>think", ""),
        ("s1", "<|im_start|>think a<|im_end|>\n", "<|im_start|>think", ""),
        ("s1", "<|im_start|>think a<|im_end|>\n<|im_start|>assistant\n<|im_start|>think b c", "", " b c"),
        # The end token of a second opening closes the first.
        ("s1", "<|im_start|>think a<|im_start|>think b", "", " b"),
        ("s1", "<|im_start|>", "<|im_start|>think", ""),
        ("s1", "", "<|im_start|>think", ""),
        ("qwen3", "hi", "<think>\n", ""),
        ("qwen3", "hi<think>\n", "", ""),
        ("qwen3", "hi<think>", "", ""),
        ("qwen3", "hi<think>\n\n a", "", "\n\n a"),
        ("qwen3", "hi<think>\n\n</think>\n\n", "<think>\n", ""),
        ("qwen3", "<think>\n a</think> b<|im_end|>\n<think>\n", "", ""),
        # A word in the question is not a region, a second one within a region no new one.
        ("qwen3", "hi<think><|im_end|>\n", "<think>\n", ""),
        ("qwen3", "hi<think>\n a<think> b", "", " a<think> b"),
        ("deepseek-r1", "hi<think>\n a.\n", "", " a.\n"),
    ],
)
def test_prompts_get_one_start_delimiter(name, prompt, start, thinking):
    prepared = prepare_prompt(encode(prompt), IDS[name])
    assert TOKENIZER.decode(prepared.prompt_ids) == prompt + start
    assert prepared.num_thinking_tokens == len(encode(thinking))
    assert prepared.ends_in_newline == thinking.endswith("\n")


def test_a_start_whose_last_piece_holds_the_white_space_is_found():
    """Where "go\\n" is one id, the ids of the start do not begin with those of the opening."""
    vocab = {"<unk>": 0, "go": 1, "go\n": 2, "\n": 3, "x": 4, "<end>": 5, "<eos>": 6}
    dictionary = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    dictionary.pre_tokenizer = pre_tokenizers.Split(Regex("go\n|go|\n|x|<end>|<eos>"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=dictionary, unk_token="<unk>")
    profile = DelimiterProfile(
        "mine", eos=("<eos>",), start="go\n", end_tokens=("<end>",), end="<end>", budget_end="<end>"
    )
    ids = tokenize_profile(profile, tokenizer, 7)
    for prompt, expected, thinking in (
        ([4], (4, 2), 0),
        ([4, 2, 4], (4, 2, 4), 1),
        ([4, 1, 4], (4, 1, 4), 1),
    ):
        prepared = prepare_prompt(prompt, ids)
        assert (prepared.prompt_ids, prepared.num_thinking_tokens) == (expected, thinking)


GOOD = """
eos: ["<|im_end|>"]
start: "<think>\\n"
end_tokens: ["</think>"]
end: "</think>"
budget_end: "</think>\\n"
budget_end_newline: true
"""


def test_a_profile_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    profile = load_profile(file)
    expected = DelimiterProfile(
        name="mine",
        eos=("<|im_end|>",),
        start="<think>\n",
        end_tokens=("</think>",),
        end="</think>",
        budget_end="</think>\n",
        budget_end_newline=True,
    )
    assert profile == expected
    assert load_profile(str(file)) == expected
    file.write_text("name: other\neos: [x]")
    assert load_profile(file) == DelimiterProfile("other", eos=("x",))


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "start: 3\nstop: x\nend_tokens: a\nbudget_end_newline: 'yes'",
            [
                "eos: missing",
                "start: expected a text, found 3",
                "stop: unknown key; known are name, eos, start,",
                "end_tokens: expected a list of texts, found 'a'",
                "budget_end_newline: expected true or false, found 'yes'",
            ],
        ),
        ("eos: [a, 3]", ["eos.1: expected a text, found 3"]),
        ("eos: []\nend_tokens: ['']", ["eos: is empty", "end_tokens: holds an empty text"]),
        (
            "eos: [a]\nstart: ' '\nend: b",
            ["start, end_tokens, budget_end: empty or missing, though end given"],
        ),
        ("- a", ["expected keys and values, found list"]),
        ("", ["expected keys and values, found NoneType"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_every_problem_of_a_file_is_reported_with_its_name(tmp_path, text, problems):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as error:
        load_profile(file)
    for problem in problems:
        assert problem in str(error.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"'s2': neither a built-in one \(s1, qwen3, deepseek-r1, none\)"):
        load_profile("s2")
