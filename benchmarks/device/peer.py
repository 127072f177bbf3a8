"""transformers' `generate` on the same GPU with the same sizes, where torch finds it."""

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec

import jax

from benchmarks.device.report import Report, Row
from benchmarks.device.sizes import Sizes
from s1jax.model.config import QwenConfig

_PROMPT, _NEW = 1_024, 64
_PROGRAM = """
import json, sys, time
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
config, rows, prompt, new = json.loads(sys.argv[1])
torch.set_default_device("cuda")
torch.set_default_dtype(torch.bfloat16)
model = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
ids = torch.randint(0, 1000, (rows, prompt))
def run(count):
    torch.cuda.synchronize()
    started = time.perf_counter()
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    torch.cuda.synchronize()
    return time.perf_counter() - started
run(2)
print((run(new + 1) - run(1)) / new)
"""
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)


def run(report: Report, sizes: Sizes) -> None:
    """Before this process holds memory that torch would want."""
    if not sizes.peer or jax.default_backend() != "gpu" or not (find_spec("torch") and find_spec("transformers")):
        return
    name, config = next(iter(sizes.models.items()))
    for rows in sizes.peer:
        case = f"{name}, {_PROMPT:,} tokens, {rows} rows"
        report.case("Decoding by transformers", case, partial(_generate, config, rows))


def _generate(config: QwenConfig, rows: int) -> Row:
    known = asdict(config)
    words = json.dumps([{field: known[field] for field in _FIELDS}, rows, _PROMPT, _NEW])
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, words], capture_output=True, text=True, check=False, timeout=90
    )
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    seconds = float(process.stdout.split()[-1])
    return {"ms a step": 1e3 * seconds, "tokens/s": rows / seconds}
