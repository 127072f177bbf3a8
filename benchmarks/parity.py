"""Hold a real checkpoint against transformers: python benchmarks/parity.py MODEL_DIR TEXTS.jsonl [TOKENS]

Reads `text` rows until TOKENS tokens (default 500), in float32 on this machine's CPU, and prints the largest difference
of the logits relative to the largest logit, the share of equal arg-max tokens, and both mean negative log-likelihoods.
Needs torch.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s1jax.config import DecodingMeshSection, ModelSection
from s1jax.model.load import load_model


def mean_nll(logits: np.ndarray, input_ids: np.ndarray) -> float:
    logprobs = torch.log_softmax(torch.tensor(logits[:-1]).double(), dim=-1)
    return float(-logprobs[torch.arange(len(input_ids) - 1), torch.tensor(input_ids[1:])].mean())


def main(directory: str, texts: str, tokens: int = 500) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    input_ids: list[int] = []
    with Path(texts).open(encoding="utf-8") as lines:
        while len(input_ids) < tokens:
            input_ids += tokenizer(json.loads(next(lines))["text"] + "\n").input_ids
    row = np.array(input_ids[:tokens])
    loaded = load_model(ModelSection(path=directory, dtype="float32"), DecodingMeshSection())
    positions = jnp.arange(tokens)[None]
    hidden, _ = jax.jit(loaded.model.hidden_states)(loaded.params, jnp.asarray(row[None]), positions)
    ours = np.asarray(jax.jit(loaded.model.logits)(loaded.params, hidden)[0])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(torch.tensor(row[None]))
    expected = theirs.logits[0].numpy()
    print(f"largest difference / largest logit: {np.abs(ours - expected).max() / np.abs(expected).max():.2e}")
    print(f"arg-max agreement over {tokens} tokens: {np.mean(ours.argmax(-1) == expected.argmax(-1)):.2%}")
    print(f"mean NLL: {mean_nll(ours, row):.6f} here, {mean_nll(expected, row):.6f} transformers")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
