"""From the `model` and `mesh` sections of a configuration to a model on its devices."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from s1jax.config import MeshSection, ModelSection, Remat
from s1jax.mesh import make_mesh
from s1jax.model import cpu_kernel
from s1jax.model.config import QwenConfig
from s1jax.model.hf import load_params, resolve_model, stored_dtypes
from s1jax.model.kernel_check import checked
from s1jax.model.qwen import Params, Qwen
from s1jax.paths import AnyPath
from s1jax.tokenizer import load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters in place, unrolled, and the directory that they and the tokenizer came from."""

    model: Qwen
    params: Params
    mesh: Mesh
    directory: AnyPath

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's tokenizer."""
        return load_tokenizer(self.directory)


def build_model(section: ModelSection, config: QwenConfig, *, param_dtype: str, remat: Remat = "none") -> Qwen:
    """A model of this architecture, run as the section says; `param_dtype` is used where the section has none."""
    return Qwen(
        config,
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype or param_dtype),
        remat=remat,
        attention=section.attention,
    )


def inference_param_dtype(section: ModelSection, directory: AnyPath, mesh: Mesh) -> str:
    """The dtype in which parameters are kept: that of the computation, or the checkpoint's bfloat16 under float32.

    The latter only where products widen weights as they read them: the numbers are the same, and half as many bytes.
    """
    with jax.set_mesh(mesh):
        widened = section.dtype == "float32" and cpu_kernel.available(jnp.bfloat16)
    return "bfloat16" if widened and stored_dtypes(directory) == {"BF16"} else section.dtype


def model_mesh(section: MeshSection) -> Mesh:
    """The devices that one model is spread over: this process's own where each has a copy, else all of them.

    Raises MeshError.
    """
    devices = jax.local_devices() if section.copies else None
    return make_mesh(section.data, section.fsdp, section.tensor, devices)


def load_model(section: ModelSection, mesh: MeshSection) -> LoadedModel:
    """Find, check and read a model for inference, its parameters in `inference_param_dtype` unless the section says.

    Raises FileNotFoundError, UnsupportedConfigError, CheckpointError or MeshError.
    """
    directory = resolve_model(section.path)
    devices = model_mesh(mesh)
    param_dtype = inference_param_dtype(section, directory, devices)
    config = QwenConfig.from_directory(directory)
    model = checked(build_model(section, config, param_dtype=param_dtype), gradients=False)
    with ThreadPoolExecutor(1) as reader:
        # Meanwhile, for those who will ask for it; they are told what is wrong with it, too.
        reader.submit(load_tokenizer, directory)
        params = load_params(directory, model, devices, stacked=False)
    return LoadedModel(model, params, devices, directory)
