"""python decode.py quantise: a model directory with weights of few bits, made once instead of whenever it is read."""

from s1jax.config import QuantiseConfig
from s1jax.locks import exclusive_file
from s1jax.model.config import QwenConfig
from s1jax.model.export import export_quantised
from s1jax.model.hf_files import resolve_adapter, resolve_model
from s1jax.model.load import needs_original
from s1jax.paths import any_path


def quantise(config: QuantiseConfig) -> None:
    """Write `config.output`, which is read as a model with `model.weights` is.

    Raises ConfigError for a model that is quantised already, InUseError, OSError, UnsupportedConfigError or
    CheckpointError; then there is no model in the output.
    """
    section, output = config.model, any_path(config.output)
    directory = resolve_model(section.path)
    needs_original("model.weights", section.weights, QwenConfig.from_directory(directory))
    adapter = resolve_adapter(section.adapter) if section.adapter else None
    with exclusive_file(output):
        export_quantised(output, directory, section.weights, adapter=adapter)
    print(f"model.path={config.output} has its weights in {section.weights}")
