"""Budgets under all their names."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1jax.serving.budgets import AskedBudget, FieldError, asked_budget

EFFORTS = {"none": 0, "low": 100, "high": "auto"}
NAMES: list[tuple[str, Any]] = [
    (name, lambda tokens, name=name: {name: tokens})
    for name in ("max_thinking_tokens", "thinking_token_budget", "thinking_budget", "thinking_budget_tokens")
]
NAMES += [
    ("reasoning.max_tokens", lambda tokens: {"reasoning": {"max_tokens": tokens}}),
    ("thinking.budget_tokens", lambda tokens: {"thinking": {"type": "enabled", "budget_tokens": tokens}}),
]
PLACES: list[tuple[str, Any]] = [
    ("", lambda body: body),
    ("extra_body.", lambda body: {"extra_body": body}),
    ("chat_template_kwargs.", lambda body: {"chat_template_kwargs": body}),
    ("extra_body.chat_template_kwargs.", lambda body: {"extra_body": {"chat_template_kwargs": body}}),
]


@pytest.mark.parametrize(("place", "put"), PLACES)
@pytest.mark.parametrize(("name", "write"), NAMES)
def test_a_maximum_holds_under_every_name_and_in_every_place(place: str, put: Any, name: str, write: Any) -> None:
    assert asked_budget(put(write(77)), EFFORTS) == AskedBudget(max_thinking_tokens=77)
    for wrong in (-5, 1.5, "many", True):
        with pytest.raises(FieldError, match=re.escape(f"{place}{name}: expected a whole number")):
            asked_budget(put(write(wrong)), EFFORTS)


@given(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.sampled_from(PLACES),
    st.integers(0, 2**31 - 1),
    st.integers(0, 9),
)
def test_two_names_agree_or_are_refused_with_both(one: Any, other: Any, place: Any, tokens: int, more: int) -> None:
    if one is other and place[0] == "":
        return  # The same key cannot stand twice.
    body = {**one[1](tokens), **place[1](other[1](min(tokens + more, 2**31 - 1)))}
    if {**place[1](other[1](0))}.keys() & one[1](0).keys():
        return
    if min(tokens + more, 2**31 - 1) == tokens:
        assert asked_budget(body, EFFORTS) == AskedBudget(max_thinking_tokens=tokens)
    else:
        with pytest.raises(FieldError, match="contradicts") as raised:
            asked_budget(body, EFFORTS)
        assert one[0] in str(raised.value)
        assert place[0] + other[0] in str(raised.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, AskedBudget()),
        ({"thinking_budget": None, "reasoning": None}, AskedBudget()),
        ({"thinking_budget": "auto"}, AskedBudget(max_thinking_tokens="auto")),
        ({"thinking_budget_tokens": -1}, AskedBudget(max_thinking_tokens="auto")),
        ({"reasoning_effort": "low"}, AskedBudget(max_thinking_tokens=100)),
        ({"reasoning": {"effort": "high", "exclude": True}}, AskedBudget(max_thinking_tokens="auto", exclude=True)),
        ({"reasoning": {"enabled": False}}, AskedBudget(max_thinking_tokens=0)),
        ({"reasoning": {"enabled": True}}, AskedBudget()),
        ({"include_reasoning": False}, AskedBudget(exclude=True)),
        ({"thinking": {"type": "disabled"}}, AskedBudget(max_thinking_tokens=0)),
        ({"thinking": {"type": "enabled"}}, AskedBudget()),
        ({"chat_template_kwargs": {"enable_thinking": False}}, AskedBudget(max_thinking_tokens=0)),
        (
            {"min_thinking_tokens": 3, "num_ignore": 2, "wait": ["Wait", "Hmm"], "max_answer_tokens": 9},
            AskedBudget(min_thinking_tokens=3, num_ignore=2, wait=("Wait", "Hmm"), max_answer_tokens=9),
        ),
    ],
)
def test_what_each_word_means(body: dict[str, Any], expected: AskedBudget) -> None:
    assert asked_budget(body, EFFORTS) == expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens: contradicts thinking.type"),
        ({"enable_thinking": False, "thinking_budget": 5}, "enable_thinking: contradicts thinking_budget"),
        ({"reasoning_effort": "low", "thinking_budget": 5}, "reasoning_effort: contradicts thinking_budget"),
        ({"reasoning_effort": "medium"}, "reasoning_effort: expected one of none, low, high, found 'medium'"),
        (
            {"min_thinking_tokens": 9, "thinking_budget": 5},
            "min_thinking_tokens: 9 is more than the 5 of thinking_budget",
        ),
        ({"thinking": {"type": "on"}}, "thinking.type: expected enabled or disabled"),
        ({"thinking": {"type": "enabled", "tokens": 5}}, "thinking.tokens: is not known"),
        ({"thinking": 5}, "thinking: expected an object"),
        ({"reasoning": {"budget": 5}}, "reasoning.budget: is not known"),
        ({"reasoning": {"exclude": 1}}, "reasoning.exclude: expected true or false"),
        ({"wait": []}, "wait: expected a text or a list of texts"),
        (
            {"chat_template_kwargs": {"thinking_buget": 5}},
            "chat_template_kwargs.thinking_buget: looks like a thinking budget",
        ),
        ({"extra_body": {"colour": 5}}, "extra_body.colour: is not a field"),
        ({"extra_body": []}, "extra_body: expected an object"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=re.escape(message)):
        asked_budget(body, EFFORTS)
