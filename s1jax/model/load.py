"""From the `model` and `mesh` sections of a configuration to a model on its devices."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s1jax.config import MeshSection, ModelSection
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.hf import load_params, resolve_model
from s1jax.model.qwen import Params, Qwen, Remat


@dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters in place, unrolled, and the directory that they and the tokenizer came from."""

    model: Qwen
    params: Params
    mesh: Mesh
    directory: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's tokenizer."""
        return AutoTokenizer.from_pretrained(self.directory)


def build_model(section: ModelSection, config: QwenConfig, *, param_dtype: str, remat: Remat = "none") -> Qwen:
    """A model of this architecture, run as the section says; `param_dtype` is used where the section has none."""
    return Qwen(
        config,
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype or param_dtype),
        remat=remat,
        attention=section.attention,
    )


def load_model(section: ModelSection, mesh: MeshSection) -> LoadedModel:
    """Find, check and read a model for inference, parameters stored in the dtype of the computation.

    Raises FileNotFoundError, UnsupportedConfigError, CheckpointError or MeshError.
    """
    directory = resolve_model(section.path)
    devices = make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
    model = build_model(section, QwenConfig.from_directory(directory), param_dtype=section.dtype)
    return LoadedModel(model, load_params(directory, model, devices, stacked=False), devices, directory)
