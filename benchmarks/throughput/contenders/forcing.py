"""The published procedure of s1 (its README): stop, append text, prefill again."""

from collections.abc import Callable

Generate = Callable[[list[list[int]], list[int], list[int]], list[list[int]]]
"""Prompts, the most new tokens of each, and ids to stop at, to the new tokens (without the id they stopped at)."""


def force(
    generate: Generate,
    prompts: list[list[int]],
    *,
    thinking: int,
    waits: int,
    answer: int,
    stop: list[int],
    eos: list[int],
    wait: list[int],
    final: list[int],
) -> list[int]:
    """Think up to `thinking` tokens, `waits` times more with "Wait" while budget is left, then answer.

    Returns each row's number of new tokens.
    """
    contexts = [list(prompt) for prompt in prompts]
    left = [thinking] * len(prompts)
    for round_ in range(waits + 1):
        rows = [row for row, budget in enumerate(left) if budget > 0]
        if not rows:
            break
        if round_ > 0:
            for row in rows:
                contexts[row] += wait
        outputs = generate([contexts[row] for row in rows], [left[row] for row in rows], stop)
        for row, output in zip(rows, outputs, strict=True):
            contexts[row] += output
            left[row] -= len(output)
    contexts = [context + final for context in contexts]
    outputs = generate(contexts, [answer] * len(prompts), eos)
    return [
        len(context) + len(output) - len(prompt)
        for context, output, prompt in zip(contexts, outputs, prompts, strict=True)
    ]
