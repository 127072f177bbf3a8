"""python -m s1jax.demo OUTPUT: make a tiny random model and score a few sentences with it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from s1jax.demo.tokenizer import build_tokenizer
from s1jax.model.config import QwenConfig
from s1jax.model.hf import export_model
from s1jax.model.qwen import Qwen

SENTENCES = [
    "Natalia sold 48 clips in April and half as many in May, so she sold 72 clips altogether.",
    "Wait, 12 * 5 is 60, not 50. Let me check this again, step by step.",
    "The answer is 7.",
]
_CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def main(output: Path) -> None:
    """Write the model, run `decode.py score` on it as a user would, print what came out."""
    directory = output / "model"
    if not directory.exists():
        tokenizer = build_tokenizer(output / "tokenizer", SENTENCES, vocab_size=320)
        model = Qwen(QwenConfig.from_hf({**_CONFIG, "vocab_size": len(tokenizer)}), dtype=jnp.float32)
        export_model(directory, model, model.init(jax.random.key(0)))
        tokenizer.save_pretrained(directory)
    texts, scores = output / "texts.jsonl", output / "scores.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES), encoding="utf-8")
    words = [f"model.path={directory}", f"input={texts}", f"output={scores}", "model.dtype=float32"]
    decode = Path(__file__).parents[2] / "decode.py"
    subprocess.run([sys.executable, str(decode), "score", *words], check=True)
    rows = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines()]
    print("A random model of 4 layers, so each token is about as likely as any other:")
    for text, row in zip(SENTENCES, rows, strict=True):
        scored = len(row["input_ids"]) - 1
        print(f"  {math.exp(row['nll'] / scored):7.1f} perplexity over {scored:3} tokens: {text}")
    print(f"scores: {scores}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
