"""Hold generation with a real checkpoint against transformers.

    python -m benchmarks.generation_parity MODEL_DIR GSM8K.jsonl

Greedy, float32, on this machine's CPU. First 20 questions x 128 tokens without budgets, against transformers' own
`generate`; then the s1 profile with 0, 1, 17 and 64 thinking tokens and 0, 1 and 2 waits on 5 questions, against the
plain rules of tests/reference driving transformers' model. Prints how many results have the same ids and flags, and
of those that have not, how close the two likeliest tokens were where they part. Needs torch.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from s1jax import ThinkingBudget, generate, load
from s1jax.config import ModelSection
from s1jax.decoding.profiles import load_profile, tokenize_profile
from s1jax.decoding.requests import encode_prompt
from tests.reference import budget as rules
from tests.reference.transformers_model import GreedyModel

QUESTIONS, NEW_TOKENS, BUDGETED_QUESTIONS, ANSWER_TOKENS = 20, 128, 5, 32


def gap_at(model: GreedyModel, context: list[int]) -> float:
    """How far apart the two likeliest tokens' logits are after this context."""
    with torch.no_grad():
        logits = np.sort(model.model(torch.tensor([context])).logits[0, -1].numpy())
    return float(logits[-1] - logits[-2])


def report(name: str, model: GreedyModel, pairs: list[tuple[list[int], list[int], list[int]]]) -> None:
    """Print the share of equal (prompt, ours, theirs) and where the others part."""
    equal = sum(ours == theirs for _, ours, theirs in pairs)
    print(f"{name}: {equal} of {len(pairs)} equal", flush=True)
    for prompt, ours, theirs in pairs:
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
            )
            print(f"  part at token {at}: top-2 logit gap {gap_at(model, prompt + theirs[:at]):.1e}", flush=True)


def main(directory: str, questions: str) -> None:
    with Path(questions).open(encoding="utf-8") as lines:
        asked = [json.loads(next(lines))["question"] for _ in range(QUESTIONS)]
    loaded = load(ModelSection(path=directory, dtype="float32"))
    vocab_size = loaded.model.config.vocab_size
    plain = tokenize_profile(load_profile("none"), loaded.tokenizer, vocab_size)
    model = GreedyModel(Path(directory), plain)

    results = generate(loaded, asked, ThinkingBudget(max_answer_tokens=NEW_TOKENS), profile="none")
    pairs = []
    for question, ours in zip(asked, results, strict=True):
        prompt = encode_prompt(question, loaded.tokenizer, chat_template=True).input_ids
        theirs = model.model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=1.0
        )[0, len(prompt) :].tolist()
        pairs.append((prompt, ours.output_ids, [i for i in theirs if i not in plain.eos]))
    report(f"{QUESTIONS} x {NEW_TOKENS} tokens against transformers' generate", model, pairs)

    encode = partial(loaded.tokenizer.encode, add_special_tokens=False)
    context_length = loaded.model.config.max_position_embeddings
    s1 = tokenize_profile(load_profile("s1"), loaded.tokenizer, vocab_size)
    model = GreedyModel(Path(directory), s1)
    for limit in (0, 1, 17, 64):
        for waits in (0, 1, 2):
            budget = ThinkingBudget(limit, num_ignore=waits, max_answer_tokens=ANSWER_TOKENS)
            results = generate(loaded, asked[:BUDGETED_QUESTIONS], budget)
            pairs = []
            for question, ours in zip(asked, results, strict=False):
                prompt = encode_prompt(question, loaded.tokenizer, chat_template=True).input_ids
                theirs = rules.run_budget(model.next_token, prompt, s1, budget, encode, context_length)
                same = ours.forced == theirs.forced and ours.num_waits == theirs.num_waits
                assert same or ours.output_ids != theirs.output_ids
                pairs.append((ours.prompt_ids, ours.output_ids, theirs.output_ids))
            report(f"B={limit} n={waits}", model, pairs)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
