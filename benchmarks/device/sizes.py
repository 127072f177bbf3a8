"""What is measured: real sizes for a device, toy ones for a CPU."""

from dataclasses import dataclass

from s1jax.model.architectures import known_architecture
from s1jax.model.config import QwenConfig
from s1jax.model.kernel_check import HeadSizes


@dataclass(frozen=True)
class Sizes:
    """The cases of a run."""

    heads: dict[str, HeadSizes]
    """Of attention, as one device has them."""
    row: int
    """Tokens of the rows that kernels are tried and trained on."""
    models: dict[str, QwenConfig]
    training_memory: float
    """Share of the device's memory that a training state may take."""
    layers: dict[str, int]
    """Of each model, how many are decoded; all where it is not named."""
    decoding: tuple[tuple[str, int, int], ...]
    """Model, tokens of each row's context, rows; the most telling first."""
    peer: tuple[int, ...]
    """Rows of transformers' `generate` with the first model."""


def _known(name: str) -> QwenConfig:
    config = known_architecture(name)
    assert config is not None
    return config


REAL = Sizes(
    heads={"32B on tensor 2": HeadSizes(20, 4, 128), "7B": HeadSizes(28, 4, 128)},
    row=8_192,
    models={"7B": _known("Qwen/Qwen2.5-7B-Instruct"), "32B": _known("Qwen/Qwen2.5-32B-Instruct")},
    training_memory=0.6,
    layers={"32B": 16},
    decoding=(
        *(("7B", 1_024, rows) for rows in (1, 8, 32, 64, 128)),
        *(("32B", 1_024, rows) for rows in (1, 32, 128)),
        *(("7B", 8_192, rows) for rows in (1, 8, 32, 64)),
        *(("32B", 8_192, rows) for rows in (8, 64)),
        *(("7B", 32_768, rows) for rows in (1, 8, 32)),
        ("32B", 32_768, 8),
    ),
    peer=(1, 8, 32),
)
_TOY = QwenConfig.from_hf(
    {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
)
TOY = Sizes(
    heads={"toy": HeadSizes(4, 2, 16)},
    row=256,
    models={"toy": _TOY},
    training_memory=0.0,
    layers={},
    decoding=(("toy", 64, 1), ("toy", 64, 4)),
    peer=(),
)
