"""Whether the device computes what it should: kernels, a small model, and budgets."""

import math
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.report import Report, Row
from benchmarks.device.sizes import Sizes
from benchmarks.device.timing import seconds_of
from s1jax.config import DecodingMeshSection, ModelSection
from s1jax.data.packing import Batch
from s1jax.decoding.api import generate
from s1jax.decoding.budget import ThinkingBudget
from s1jax.decoding.profiles import load_profile, prepare_prompt, tokenize_profile
from s1jax.demo.tokenizer import build_tokenizer
from s1jax.mesh import make_mesh
from s1jax.model.attention import attention, choose
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.kernel_check import TOLERANCES, HeadSizes, attention_errors, paged_error
from s1jax.model.load import load_model
from s1jax.model.paged_attention import PAGE, choose_paged
from s1jax.model.qwen import Qwen
from s1jax.training.step import gradients
from tests.reference.budget import run_budget

_EXAMPLES = 16
_SMALL = {
    "model_type": "qwen2",
    "vocab_size": 1_024,
    "hidden_size": 512,
    "intermediate_size": 1_024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1_024,
    "tie_word_embeddings": False,
}
_CORPUS = ["think answer Wait, Final Answer: the sum of 3 and 4 is 7.\n", "Let me check this step by step.\n\n"] * 8


def run(report: Report, sizes: Sizes) -> None:
    """Kernels, then loss and gradients, then budgets."""
    for name, heads in sizes.heads.items():
        for packed in (True, False):
            title = f"{name}, {'packed' if packed else 'one example a row'}"
            report.case("Attention kernels", title, partial(_kernel, report, title, heads, sizes.row, packed))
        title = f"{name}, over pages"
        report.case("Attention kernels", title, partial(_paged_kernel, report, title, heads, sizes.row))
    for dtype in ("float32", "bfloat16"):
        report.case("A small model", f"loss and gradients, {dtype}", partial(_parity, report, dtype))
    report.case("A small model", "budgets, float32", partial(_budgets, report))


def _kernel(report: Report, title: str, heads: HeadSizes, length: int, packed: bool) -> Row:
    name = choose(length, jnp.bfloat16, packed=packed, lengths_known=True)
    mean = length // _EXAMPLES
    lengths = [[mean] * (_EXAMPLES - 1), [length]] if packed else [[length]] * 2
    errors = attention_errors(name, heads, jnp.bfloat16, lengths, length, packed=packed, gradients=True)
    worst, limit = max(errors.values()), TOLERANCES["bfloat16"]
    report.verdict(f"{name} is attention ({title})", passed=worst <= limit, found=f"{worst:.2g} away, limit {limit:g}")

    shapes = [(1, length, count, heads.head_dim) for count in (heads.heads, heads.kv_heads, heads.kv_heads)]
    qkv = tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    quarter = length // 4
    ids = jnp.asarray(np.repeat(np.arange(1, 5, dtype=np.int32), quarter)[None]) if packed else None
    table = jnp.full((1, 4), quarter, jnp.int32) if packed else None

    def loss(qkv: tuple[jax.Array, ...]) -> jax.Array:
        out = attention(*qkv, segment_ids=ids, segment_lengths=table, implementation=name)
        return jnp.sum(out.astype(jnp.float32))

    forward, backward = jax.jit(loss), jax.jit(jax.grad(loss))
    squares = 4 * quarter**2 if packed else length**2
    flops = 2.0 * squares * heads.heads * heads.head_dim
    there, back = seconds_of(lambda: forward(qkv)), seconds_of(lambda: backward(qkv))
    return {
        "kernel": name,
        "error": worst,
        "forward ms": 1e3 * there,
        "forward TFLOP/s": flops / there / 1e12,
        "with gradients ms": 1e3 * back,
        "with gradients TFLOP/s": 3.5 * flops / back / 1e12,
    }


def _paged_kernel(report: Report, title: str, heads: HeadSizes, length: int) -> Row:
    name = choose_paged(jnp.bfloat16, heads.head_dim, is_quantised=False)
    error = paged_error(name, heads, jnp.bfloat16, [1, PAGE - 1, PAGE, PAGE + 1, length // 2, length])
    limit = TOLERANCES["bfloat16"]
    report.verdict(f"{name} is attention ({title})", passed=error <= limit, found=f"{error:.2g} away, limit {limit:g}")
    return {"kernel": name, "error": error}


def _batch(rows: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    shape, lengths = (1, rows, length), [length // 2, length // 4, length // 8]
    ids = np.zeros(shape, np.int32)
    ids[..., : sum(lengths)] = np.repeat([1, 2, 3], lengths)
    positions = np.zeros(shape, np.int32)
    positions[..., : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    tokens, targets = rng.integers(0, 1_000, (2, *shape)).astype(np.int32)
    weights = (ids > 0).astype(np.float32) / np.count_nonzero(ids)
    return Batch(tokens, targets, positions, ids, np.broadcast_to(np.int32(lengths), (1, rows, 3)), weights)


def _parity(report: Report, dtype: str) -> Row:
    batch = _batch(2, 512)
    model = Qwen(QwenConfig.from_hf(_SMALL), dtype=jnp.dtype(dtype), remat="gate")
    with jax.set_mesh(_one_device("cpu")):
        params = jax.device_get(model.init(jax.random.key(0)))

    def on(platform: str, model: Qwen) -> Any:
        with jax.set_mesh(_one_device(platform)):
            return jax.device_get(jax.jit(partial(gradients, model))(params, {}, batch))

    right, (loss, found) = on("cpu", Qwen(model.config, dtype=jnp.float32)), on(jax.default_backend(), model)
    # Of all together: a bias of keys has no gradient but rounding.
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(right[1]), strict=True))
    off = math.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))
    limit = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    worst = max(off, abs(float(loss) / float(right[0]) - 1))
    report.verdict(
        f"loss and gradients in {dtype} are the CPU's in float32",
        passed=worst <= limit,
        found=f"{worst:.2g} away, limit {limit:g}",
    )
    return {"error": worst}


def _one_device(platform: str) -> jax.sharding.Mesh:
    return make_mesh(1, 1, 1, jax.devices(platform)[:1])


def _budgets(report: Report) -> Row:
    """Tokens, flags and counts of the compiled loop under budgets, and those of the plain rules, token by token."""
    with tempfile.TemporaryDirectory() as name:
        loaded = load_model(
            ModelSection(path=str(_thinker(Path(name) / "model")), dtype="float32"), DecodingMeshSection()
        )
        tokenizer = loaded.tokenizer
    context = loaded.model.config.max_position_embeddings
    profile = tokenize_profile(load_profile("s1"), tokenizer, loaded.model.config.vocab_size)

    @jax.jit
    def scores(tokens: jax.Array, last: jax.Array) -> jax.Array:
        hidden, _ = loaded.model.hidden_states(loaded.params, tokens[None], jnp.arange(context)[None])
        return loaded.model.logits(loaded.params, hidden[0, last])

    def next_token(tokens: list[int], masked: bool) -> int:
        padded = np.pad(np.array(tokens, np.int32), (0, context - len(tokens)))
        drawn = np.where(profile.valid, scores(padded, len(tokens) - 1), -np.inf)
        if masked:
            drawn[list(profile.end_tokens)] = -np.inf
        return int(drawn.argmax())

    bounds: list[int | Literal["auto"]] = ["auto", 0, 1, 7, 16, 40]
    budgets = [
        ThinkingBudget(max_thinking_tokens=bound, num_ignore=waits, max_answer_tokens=8)
        for bound in bounds
        for waits in (0, 2)
    ]
    prompts = [[int(token) for token in np.random.default_rng(i).integers(0, 360, 5 + i)] for i in range(len(budgets))]
    written = generate(loaded, prompts, budgets, batch_size=4)
    with jax.set_mesh(loaded.mesh):
        expected = [
            run_budget(
                next_token,
                prepare_prompt(prompt, profile).prompt_ids,
                profile,
                budget,
                partial(tokenizer.encode, add_special_tokens=False),
                context,
            )
            for prompt, budget in zip(prompts, budgets, strict=True)
        ]
    different = [
        index
        for index, (ours, right) in enumerate(zip(written, expected, strict=True))
        if any(asdict(ours)[key] != value for key, value in asdict(right).items())
    ]
    report.verdict(
        "greedy decoding under budgets in float32 is the reference's: tokens, flags, counts, reasons",
        passed=not different,
        found=f"{len(budgets) - len(different)} of {len(budgets)} rows are",
    )
    return {"rows": len(budgets), "tokens": sum(len(row.output_ids) for row in written)}


def _thinker(directory: Path) -> Path:
    """A random model that ends its thinking often: the embeddings of its delimiters are long."""
    config = QwenConfig.from_hf({**_SMALL, "vocab_size": 384, "max_position_embeddings": 160, "initializer_range": 0.1})
    model = Qwen(config, dtype=jnp.float32)
    with jax.set_mesh(_one_device("cpu")):
        params = jax.tree.map(np.array, model.init(jax.random.key(3)))
    # The tokenizer's delimiters are its last ids.
    params["head"]["weight"][350:368] *= 2.5
    export_model(directory, model, jax.tree.map(jnp.asarray, params))
    build_tokenizer(directory, _CORPUS, vocab_size=420)
    return directory
