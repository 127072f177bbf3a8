"""Budget forcing one row at a time, in lists and ifs: the specification of the compiled automaton.

The rules, which the code below cites by number. While a row thinks, an *end attempt* is a sampled token of
the profile's end set (its end tokens and every eos), and a *forced* token is one written in place of the
model's.

 1. The context starts as prompt + start delimiter. A prompt that already holds an open thinking region gets
    no second one, and the thinking tokens in it count.
 2. While thinking, if the count of thinking tokens has reached B: budget end. `budget_end` is forced, after a
    newline if the profile wants one and the last thinking token's text does not end in one.
 3. An end attempt is suppressed
    a. with a wait, if fewer than n were suppressed this way and count + len(wait) + 1 <= B: the wait text is
       forced instead (its tokens count), and the next sampled token may not be an end token. So with an empty
       text the token is drawn again at once, with the end tokens masked. Several wait texts take turns.
    b. else, if the count is below m: the token is drawn again with the end tokens masked.
 4. Otherwise an end attempt is a natural end: it is replaced by the forced `end` text.
 5. Then the row answers: at most A sampled tokens, until an eos, which is not written.
 6. A row stops when prompt and output reach the total limit. While thinking, room for `budget_end` (with a
    newline) and for A (one token, where there is no A) is kept back, so B is at most what that leaves; "auto"
    is just that.
 7. A finished row writes nothing more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.profiles import ProfileIds


@dataclass
class Result:
    prompt_ids: list[int]
    output_ids: list[int]
    forced: list[bool]
    num_thinking_tokens: int
    num_answer_tokens: int
    num_forced_tokens: int
    num_waits: int
    thinking_end: str | None
    finish_reason: str


def run(
    next_token: Callable[[list[int], bool], int],
    prompt_ids: Sequence[int],
    profile: ProfileIds,
    *,
    max_thinking_tokens: int | str | None,
    min_thinking_tokens: int,
    num_ignore: int,
    waits: Sequence[Sequence[int]],
    max_answer_tokens: int | None,
    max_total_tokens: int,
) -> Result:
    """`next_token(context, masked)` is the model: it draws a token, and no end token if `masked`.

    `waits` are the wait texts' ids; `max_total_tokens` is the context length or less.
    Raises ValueError where the room kept back is more than there is.
    """
    # Rule 1.
    prompt, count = with_start(list(prompt_ids), profile)
    context = list(prompt)
    forced: list[bool] = []
    num_waits = num_answer_tokens = 0
    thinking_end = None

    def full() -> bool:
        return len(context) >= max_total_tokens

    def write(token: int, by_force: bool) -> None:
        context.append(token)
        forced.append(by_force)

    def result(finish_reason: str) -> Result:
        return Result(
            prompt_ids=prompt,
            output_ids=context[len(prompt) :],
            forced=forced,
            num_thinking_tokens=count,
            num_answer_tokens=num_answer_tokens,
            num_forced_tokens=sum(forced),
            num_waits=num_waits,
            thinking_end=thinking_end,
            finish_reason=finish_reason,
        )

    # Rule 6.
    answer = 1 if max_answer_tokens is None or not profile.profile.thinks else max_answer_tokens
    ending = max(profile.budget_end, profile.budget_end_with_newline, key=len)
    room = max_total_tokens - len(prompt) - len(ending) - answer
    if room < 0:
        raise ValueError("no room to answer")
    room += count  # the thinking tokens in the prompt take nothing from it
    if max_thinking_tokens == "auto":
        limit, limit_is = room, "budget"
    elif max_thinking_tokens is None or max_thinking_tokens > room:
        limit, limit_is = room, "context"
    else:
        limit, limit_is = max_thinking_tokens, "budget"

    ending = ()
    while profile.profile.thinks:
        # Rule 2.
        if count >= limit:
            thinking_end = limit_is
            after_newline = count > 0 and profile.ends_in_newline[context[-1]]
            ending = profile.budget_end if after_newline else profile.budget_end_with_newline
            break
        token = next_token(context, False)
        if token in profile.end_tokens:
            wait = waits[num_waits % len(waits)]
            # Rule 3a.
            if num_waits < num_ignore and count + len(wait) + 1 <= limit:
                num_waits += 1
                for wait_token in wait:
                    count += 1
                    write(wait_token, True)
                token = next_token(context, True)
            # Rule 3b.
            elif count < min_thinking_tokens:
                token = next_token(context, True)
            # Rule 4.
            else:
                thinking_end = "eos" if token in profile.eos else "natural"
                ending = profile.end
                break
        count += 1
        write(token, False)

    for token in ending:
        # Rule 6.
        if full():
            return result("context")
        write(token, True)

    # Rule 5.
    while max_answer_tokens is None or num_answer_tokens < max_answer_tokens:
        # Rule 6.
        if full():
            return result("context")
        token = next_token(context, False)
        if token in profile.eos:
            return result("stop")
        num_answer_tokens += 1
        write(token, False)
    return result("length")


def run_budget(
    next_token: Callable[[list[int], bool], int],
    prompt_ids: Sequence[int],
    profile: ProfileIds,
    budget: ThinkingBudget,
    encode: Callable[[str], Sequence[int]],
    context_length: int,
) -> Result:
    """`run` with the settings of a `ThinkingBudget`, its wait texts made ids by `encode`."""
    return run(
        next_token,
        prompt_ids,
        profile,
        max_thinking_tokens=budget.max_thinking_tokens,
        min_thinking_tokens=budget.min_thinking_tokens,
        num_ignore=budget.num_ignore,
        waits=[encode(text) for text in budget.waits],
        max_answer_tokens=budget.max_answer_tokens,
        max_total_tokens=min(context_length, budget.max_total_tokens or context_length),
    )


def with_start(prompt: list[int], profile: ProfileIds) -> tuple[list[int], int]:
    """Return prompt + start delimiter, and how many thinking tokens it holds."""
    if not profile.profile.thinks:
        return prompt, 0
    for begin in range(len(prompt)):
        for delimiter in (profile.start, profile.opening):
            rest = prompt[begin + len(delimiter) :]
            opens = tuple(prompt[begin : begin + len(delimiter)]) == delimiter
            if opens and not set(rest) & set(profile.end_tokens):
                return prompt, len(rest)
    return prompt + list(profile.start), 0
