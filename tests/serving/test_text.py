"""Text that comes in parts is that of the whole."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from s1jax.decoding.budget import FinishReason, RowState, ThinkingEnd
from s1jax.decoding.profiles import PROFILES, prepare_prompt, tokenize_profile
from s1jax.decoding.results import generation_of
from s1jax.serving.text import AnswerText, Piece, joined
from s1jax.tokenizer import encode, load_tokenizer

WORDS = ["Wait", "the sum", " of é", "日本", "\n\n", "😀", "ab", "b", "So 7."]


def text_of(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@given(data=st.data())
def test_parts_make_the_whole(data: st.DataObject, tokenizer_directory: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    name = data.draw(st.sampled_from(["s1", "qwen3", "none"]))
    if name == "qwen3" and len(encode("</think>", tokenizer)) > 1:
        name = "s1"
    profile = tokenize_profile(PROFILES[name], tokenizer, 384)
    any_ids = st.one_of(
        st.lists(st.integers(0, 355), max_size=12),
        st.lists(st.sampled_from(WORDS), max_size=6).map(lambda words: encode("".join(words), tokenizer)),
    )
    thinking = data.draw(any_ids) if profile.profile.thinks else []
    ending = list(data.draw(st.sampled_from([profile.end, profile.budget_end_with_newline]))) if thinking else []
    answer = data.draw(any_ids) if ending or not profile.profile.thinks else []
    ids, forced = thinking + ending + answer, [False] * len(thinking) + [True] * len(ending) + [False] * len(answer)
    state = RowState(*([0] * len(RowState._fields)))._replace(
        num_thinking_tokens=len(thinking), thinking_end=ThinkingEnd.NATURAL, finish_reason=FinishReason.STOP
    )
    prompt = prepare_prompt(encode("Q", tokenizer), profile)
    whole = generation_of(prompt, ids, forced, None, state, profile, tokenizer)
    stop = data.draw(st.lists(st.sampled_from(["b", "ab", "日", "sum of", "zz"]), max_size=2))

    stream, pieces, at = AnswerText(tokenizer, profile, stop), [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 5))
        part = slice(at, at + size)
        pieces += stream.take(ids[part], forced[part], min(len(thinking), at + size))
        at += size
        if stream.stopped:
            break
    pieces += stream.end()
    assert text_of(pieces, "reasoning") == whole.thinking
    found = [where for text in stop if (where := whole.answer.find(text)) >= 0]
    assert text_of(pieces, "content") == whole.answer[: min(found, default=None)]
    assert stream.stopped == bool(found)
    assert [piece.forced for piece in joined(pieces, by_forced=False) if piece.kind == "reasoning"] in ([], [False])
    apart = joined(pieces, by_forced=True)
    assert "".join(piece.text for piece in apart) == whole.thinking + text_of(pieces, "content")
