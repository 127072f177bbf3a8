"""From the `model` and `mesh` sections of a configuration to a model on its devices."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from s1jax.config import CacheDtype, ComputationSection, DecodingMeshSection, ModelSection, Remat
from s1jax.config_reader import ConfigError
from s1jax.mesh import make_mesh
from s1jax.model import cpu_kernel
from s1jax.model.config import QwenConfig
from s1jax.model.hf import load_params
from s1jax.model.hf_files import resolve_adapter, resolve_model, stored_dtypes
from s1jax.model.kernel_check import checked
from s1jax.model.placement import MeshSizes, decoding_mesh_sizes, described, machine_of
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


def build_model(section: ComputationSection, config: QwenConfig, *, param_dtype: str, remat: Remat = "none") -> Qwen:
    """A model of this architecture, run as the section says; `param_dtype` is used where the section has none."""
    return Qwen(
        config,
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype or param_dtype),
        remat=remat,
        attention=section.attention,
        quantisation=config.quantisation,
    )


def needs_original(key: str, value: object, config: QwenConfig) -> None:
    """Raise ConfigError if a key has a value that goes with weights as they were before they were quantised."""
    if value and config.quantisation:
        raise ConfigError(
            f"{key}: the model's weights are {config.quantisation} already; it goes with those that they were made of"
        )


def decoding_model(section: ModelSection, config: QwenConfig, cache_dtype: CacheDtype | None = None) -> Qwen:
    """The model as it decodes: parameters are kept in the dtype of the computation, unless the section says else.

    Raises ConfigError for what cannot be made of weights that are quantised already.
    """
    needs_original("model.weights", section.weights, config)
    needs_original("model.adapter", section.adapter, config)
    model = build_model(section, config, param_dtype=section.dtype)
    return replace(model, quantisation=section.weights or config.quantisation, cache_dtype=cache_dtype)


def inference_model(
    section: ModelSection, mesh_section: DecodingMeshSection, directory: AnyPath, cache_dtype: CacheDtype | None = None
) -> tuple[Qwen, Mesh]:
    """The directory's model as inference runs it, and the devices that it is spread over, which is said on a line.

    Those are this process's own where each process has a copy, else all. Parameters are kept in the dtype of the
    computation, or, where products widen weights as they read them and the section does not say, in the checkpoint's
    bfloat16 under float32: the numbers are the same, and half as many bytes. Raises MeshError.
    """
    model = decoding_model(section, QwenConfig.from_directory(directory), cache_dtype)
    devices = jax.local_devices() if mesh_section.copies else jax.devices()
    sizes = decoding_mesh_sizes(mesh_section, model, machine_of(devices))
    mesh = make_mesh(*sizes, devices)
    if mesh.size > 1 and jax.process_index() == 0:
        print(described(mesh_section, model, MeshSizes(**mesh.shape)), file=sys.stderr)
    with jax.set_mesh(mesh):
        widened = section.dtype == "float32" and section.param_dtype is None and cpu_kernel.available(jnp.bfloat16)
        if widened and stored_dtypes(directory, quantised=model.quantisation is not None) == {"BF16"}:
            model = replace(model, param_dtype=jnp.dtype("bfloat16"))
    return checked(model, gradients=False), mesh


def read_params(section: ModelSection, directory: AnyPath, model: Qwen, mesh: Mesh) -> Params:
    """The directory's weights as inference wants them, unrolled, with the section's adapter merged into them.

    Raises FileNotFoundError, CheckpointError or MeshError.
    """
    adapter = resolve_adapter(section.adapter) if section.adapter else None
    return load_params(directory, model, mesh, stacked=False, adapter=adapter)


def load_model(section: ModelSection, mesh: DecodingMeshSection, cache_dtype: CacheDtype | None = None) -> LoadedModel:
    """Find, check and read a model for inference: `inference_model` with its parameters.

    `cache_dtype` is that of keys and values while it decodes, None: that of the computation. Raises FileNotFoundError,
    UnsupportedConfigError, CheckpointError or MeshError.
    """
    directory = resolve_model(section.path)
    model, devices = inference_model(section, mesh, directory, cache_dtype)
    with ThreadPoolExecutor(1) as reader:
        # Meanwhile, for those who will ask for it; they are told what is wrong with it, too.
        reader.submit(load_tokenizer, directory)
        params = read_params(section, directory, model, devices)
    return LoadedModel(model, params, devices, directory)
