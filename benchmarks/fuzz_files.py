"""A small whole set of the files that commands read, and how each is read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors

from s1jax import ThinkingBudget
from s1jax.config import EvaluateConfig, GenerateConfig, ScoreConfig
from s1jax.config_reader import load_config
from s1jax.curation.card import Entry, add_to_card
from s1jax.curation.collect import collect
from s1jax.curation.config import CurateConfig
from s1jax.curation.files import read_questions
from s1jax.curation.filter import filter_questions
from s1jax.curation.format import format_rows
from s1jax.curation.select import select
from s1jax.data.examples import load_examples
from s1jax.decoding.profiles import ProfileIds, load_profile, prepare_prompt, profile_of_model, tokenize_profile
from s1jax.decoding.requests import encode_prompt, read_prompts
from s1jax.decoding.score import read_rows
from s1jax.demo.tokenizer import build_tokenizer
from s1jax.evaluation.tasks import load_tasks
from s1jax.jsonl import written_rows
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_model
from s1jax.model.hf import check_sizes, load_params
from s1jax.model.qwen import Qwen
from s1jax.model.safetensors_files import read_header
from s1jax.resume import keep_settings
from s1jax.tokenizer import load_tokenizer
from s1jax.training.checkpoint import Checkpoints
from s1jax.training.checkpoint_files import damage
from s1jax.training.config import TrainConfig
from s1jax.training.metrics import MetricsFile
from s1jax.training.run_directory import check_config
from s1jax.training.step import TrainState

_ROOT = Path(__file__).parents[1]
_MODEL = {
    "model_type": "qwen2",
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "eos_token_id": 364,
}
_CORPUS = ["think answer assistant user system Wait, Final Answer: the sum of 3 and 4 is 7. So 12 * 5 = 60.\n"] * 8
_MESSAGES = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "<think>\nSo\n</think>\n7."},
]
_PROFILE = """name: mine
start: "<think>\\n"
end_tokens: ["</think>"]
end: "</think>"
budget_end: "\\n</think>\\n\\n"
budget_end_newline: false
eos: ["<|im_end|>", "<|endoftext|>"]
"""
_CHECKPOINT = "run/checkpoints/3/default"

Same = Callable[[bytes, bytes, Any], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it is, what shape its content has, and what reads it."""

    name: str
    file: str
    shape: str
    read: Callable[[Path], Any]
    same: Same | None = None
    """Whether of the whole file's content, the damaged one's and what was read, the numbers are the same."""
    anonymous: bool = False
    """The error need not name the file: that of a configuration names the key, that of a stage may name the stage."""


def _rows() -> dict[str, list[dict[str, Any]]]:
    """The content of each file of lines."""
    s1k = {"question": "What is 3 + 4?", "thinking_trajectories": ["3 and 4"], "attempt": "7", "solution": "7"}
    question = {"id": "a", "question": "3 + 4?", "answer": "7", "source": "s", "domain": None, "metadata": {"k": 1}}
    trace = {"id": "a", "status": "done", "reason": None, "trace": "3 and 4", "answer": "7", "cost": 0.1}
    grades = [{"who": "teacher", "id": "a", "method": "math-verify", "verdict": "right", "reason": None}]
    filtered = {**question, "domain": "sums", "trace": "3 and 4", "attempt": "7", "teacher": "right"}
    return {
        "train.jsonl": [{**s1k, "attempt": str(i)} for i in range(4)],
        "messages.jsonl": [{"messages": _MESSAGES}, {"messages": [{"role": "system", "content": "Add."}, *_MESSAGES]}],
        "prompts.jsonl": [
            {"id": 1, "prompt": "What is 3 + 4? <think>", "max_thinking_tokens": 4, "wait": "Wait"},
            {"id": "b", "messages": _MESSAGES, "num_ignore": 1},
            {"input_ids": [1, 2, 3]},
        ],
        "score.jsonl": [{"id": 1, "text": "3 and 4 is 7."}, {"input_ids": [1, 2, 3]}],
        "tasks.jsonl": [{"id": i, "problem": f"What is {i} + 4?", "answer": i + 4} for i in range(3)],
        "outputs.jsonl": [{"id": i, "text": "7", "output_ids": [1, 2]} for i in range(3)],
        "run/metrics.jsonl": [{"step": i, "loss": 1.0 / i} for i in range(1, 5)],
        # Each stage in a directory of its own: it writes what the next one reads.
        "filter/questions.jsonl": [question, {**question, "id": "b"}],
        "filter/traces.jsonl": [trace, {**trace, "id": "b"}],
        "filter/grades.jsonl": [*grades, {**grades[0], "who": "pupil", "verdict": "wrong"}],
        "select/filtered.jsonl": [filtered, {**filtered, "id": "b"}],
        "format/selected.jsonl": [filtered, {**filtered, "id": "b"}],
    }


def write_whole_set(base: Path) -> None:
    """Write all files below `base`."""
    for name, rows in _rows().items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = _rows()["train.jsonl"]
    (base / "train.json").write_text(json.dumps(train))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(train), base / "train.parquet")
    for name, source in (
        ("train", "sft/s1-7b-single-host-8"),
        ("evaluate", "eval/gsm8k"),
        ("curate", "curation/gsm8k-small"),
    ):
        shutil.copy(_ROOT / "configs" / f"{source}.yaml", base / f"{name}.yaml")
    shutil.copy(_ROOT / "configs/decode/qwen3.yaml", base / "base.yaml")
    (base / "generate.yaml").write_text(
        "extends: base.yaml\nprompts: prompts.jsonl\noutput: out.jsonl\nlogprobs: yes\n"
    )
    (base / "score.yaml").write_text("model: {path: model, dtype: float32}\ninput: score.jsonl\noutput: out.jsonl\n")
    (base / "profile.yaml").write_text(_PROFILE)
    model = Qwen(QwenConfig.from_hf(_MODEL), dtype=jnp.float32)
    export_model(base / "model", model, _params(), max_file_bytes=20_000)
    build_tokenizer(base / "model", _CORPUS, vocab_size=420)
    (base / "model/config.json").write_text(json.dumps(_MODEL))
    (base / "model/generation_config.json").write_text('{"eos_token_id": [364, 362], "temperature": 0.7}')
    state = TrainState(jnp.array(3, jnp.int32), {"matrix": jnp.ones((4, 4))}, {"mu": jnp.zeros(4)})
    checkpoints = Checkpoints(base / "run/checkpoints", base / "run/damaged", 2)
    checkpoints.save(state, {"step": 3, "order": [1, 2]})
    checkpoints.close()
    _check_config(base)
    _keep_settings(base)
    add_to_card(base / "format", "collect", _ENTRY, {"k": 1})


_ENTRY = Entry([("collected", 3), ("left", 2)], {"by source": {"s": 2}})


def _keep_settings(base: Path) -> None:
    keep_settings(
        {"seed": 3, "model": {"dtype": "float32"}}, base / "outputs.jsonl", base / "outputs.jsonl.config.json"
    )


def _config(root: type[Any], name: str, *words: str) -> Callable[[Path], Any]:
    return lambda base: load_config(root, [str(base / name), *words])


def _curate(base: Path) -> CurateConfig:
    words = [f"output_dir={base}/curate", f"sources={{s: {{path: {base}/tasks.jsonl, question: problem}}}}"]
    return load_config(CurateConfig, [*words, "evaluation_sets={}", "students={pupil: {}}", "select.size=1"])


@cache
def _tokens(base: Path) -> tuple[Any, ProfileIds]:
    """The whole tokenizer, which is not damaged where this is asked for."""
    load_tokenizer.cache_clear()
    tokenizer = load_tokenizer(base / "model")
    return tokenizer, tokenize_profile(load_profile("s1"), tokenizer, _MODEL["vocab_size"])


def _read_tokenizer(base: Path) -> None:
    load_tokenizer.cache_clear()
    tokenizer = load_tokenizer(base / "model")
    ids = profile_of_model(load_profile("s1"), tokenizer, base / "model", _MODEL["vocab_size"])
    encoded = encode_prompt([*_MESSAGES, _MESSAGES[0]], tokenizer, chat_template=True)
    prepare_prompt(encoded.input_ids, ids, encoded.after_user)


def _read_config_json(base: Path) -> None:
    config = QwenConfig.from_directory(base / "model")
    check_sizes(base / "model", config)


def _load(base: Path) -> Any:
    model = Qwen(QwenConfig.from_directory(base / "model"), dtype=jnp.float32)
    return load_params(base / "model", model, make_mesh(1, 1, 1, jax.devices()[:1]))


@cache
def _params() -> Any:
    """Those of the set's model."""
    return Qwen(QwenConfig.from_hf(_MODEL), dtype=jnp.float32).init(jax.random.key(0))


def _same_params(whole: bytes, content: bytes, found: Any) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(_params())))


def _load_file(base: Path) -> dict[str, bytes]:
    _load(base)
    header = read_header(base / _WEIGHTS)
    return {name: tensor.read_rows(0, tensor.shape[0]).tobytes() for name, tensor in header.items()}


_WEIGHTS = "model/model-00001-of-00002.safetensors"


def _as_the_library(whole: bytes, content: bytes, found: dict[str, bytes]) -> bool:
    try:
        return {name: bytes(tensor["data"]) for name, tensor in safetensors.deserialize(content)} == found
    except safetensors.SafetensorError:
        return False


def _read_examples(name: str) -> Callable[[Path], Any]:
    return lambda base: load_examples(str(base / name), _tokens(base)[0], block_size=128, overlong="truncate")


def _read_prompts(base: Path) -> None:
    read_prompts(base / "prompts.jsonl", *_tokens(base), _BUDGET, chat_template=True)


def _select(base: Path) -> None:
    select(_curate(base), base / "select")


def _format(base: Path) -> None:
    format_rows(_curate(base).format, base / "format")


def _check_config(base: Path) -> None:
    check_config(base / "run", load_config(TrainConfig, [str(base / "train.yaml")]), "0123")


def _read_checkpoint(base: Path) -> None:
    if damaged := damage(base / _CHECKPOINT):
        raise ValueError(f"{base}: {damaged}")


def _unchanged(whole: bytes, content: bytes, found: object) -> bool:
    return whole == content


def _same_json(whole: bytes, content: bytes, found: object) -> bool:
    return bool(json.loads(whole) == json.loads(content))


_CONFIGS = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "score": ScoreConfig,
    "curate": CurateConfig,
}
_BUDGET = ThinkingBudget(max_answer_tokens=8)

KINDS = [
    *(
        Kind(f"{n}.yaml", f"{n}.yaml", "yaml", _config(root, f"{n}.yaml"), anonymous=True)
        for n, root in _CONFIGS.items()
    ),
    Kind("extended yaml", "base.yaml", "yaml", _config(GenerateConfig, "generate.yaml"), anonymous=True),
    Kind("profile", "profile.yaml", "yaml", lambda b: load_profile(b / "profile.yaml")),
    Kind("config.json", "model/config.json", "json", _read_config_json),
    Kind("generation_config.json", "model/generation_config.json", "json", _read_tokenizer),
    Kind("index.json", "model/model.safetensors.index.json", "json", _load, _same_params),
    Kind("safetensors", _WEIGHTS, "safetensors", _load_file, _as_the_library),
    Kind("tokenizer.json", "model/tokenizer.json", "json", _read_tokenizer),
    Kind("tokenizer_config.json", "model/tokenizer_config.json", "json", _read_tokenizer),
    Kind("chat_template.jinja", "model/chat_template.jinja", "text", _read_tokenizer),
    Kind("train.jsonl", "train.jsonl", "lines", _read_examples("train.jsonl")),
    Kind("messages.jsonl", "messages.jsonl", "lines", _read_examples("messages.jsonl")),
    Kind("train.json", "train.json", "json", _read_examples("train.json")),
    Kind("train.parquet", "train.parquet", "parquet", _read_examples("train.parquet")),
    Kind("prompts", "prompts.jsonl", "lines", _read_prompts),
    Kind("score", "score.jsonl", "lines", lambda b: read_rows(b / "score.jsonl", _tokens(b)[0], 384, 256)),
    Kind("tasks", "tasks.jsonl", "lines", lambda b: load_tasks([str(b / "tasks.jsonl")], seed=0, limit=None)),
    Kind("outputs", "outputs.jsonl", "lines", lambda b: written_rows(b / "outputs.jsonl")),
    Kind("outputs' settings", "outputs.jsonl.config.json", "json", _keep_settings),
    Kind("run's config.json", "run/config.json", "json", _check_config),
    Kind("metrics", "run/metrics.jsonl", "lines", lambda b: MetricsFile(b / "run/metrics.jsonl", 3).close()),
    Kind("checkpoint manifest", f"{_CHECKPOINT}/manifest.0.json", "json", _read_checkpoint, _same_json),
    Kind("checkpoint loader", f"{_CHECKPOINT}/loader.json", "json", _read_checkpoint, _unchanged),
    Kind("checkpoint array", f"{_CHECKPOINT}/params.matrix/c/0/0", "bytes", _read_checkpoint, _unchanged),
    Kind("checkpoint zarr.json", f"{_CHECKPOINT}/params.matrix/zarr.json", "json", _read_checkpoint, _unchanged),
    Kind("curate's source", "tasks.jsonl", "lines", lambda b: collect(_curate(b), b / "collected")),
    Kind("curate's questions", "filter/questions.jsonl", "lines", lambda b: read_questions(b / "filter")),
    Kind("curate's traces", "filter/traces.jsonl", "lines", lambda b: filter_questions(_curate(b), b / "filter")),
    Kind("curate's grades", "filter/grades.jsonl", "lines", lambda b: filter_questions(_curate(b), b / "filter")),
    Kind("curate's filtered", "select/filtered.jsonl", "lines", _select, anonymous=True),
    Kind("curate's selected", "format/selected.jsonl", "lines", _format, anonymous=True),
    Kind("curate's card", "format/card.json", "json", lambda b: add_to_card(b / "format", "filter", _ENTRY, {})),
]
