"""Run a model: python decode.py MODE [CONFIG.yaml] section.key=value ..."""

import importlib
import sys
from typing import Any

from s1jax.config import BenchmarkConfig, EvaluateConfig, GenerateConfig, QuantiseConfig, ScoreConfig, ServeConfig
from s1jax.config_reader import command_line
from s1jax.device_memory import use_most_of_memory
from s1jax.planning.hardware import use_compilers_only

MODES: dict[str, tuple[type[Any], str]] = {
    "generate": (GenerateConfig, "s1jax.decoding.cli"),
    "evaluate": (EvaluateConfig, "s1jax.evaluation.evaluate"),
    "score": (ScoreConfig, "s1jax.decoding.score"),
    "benchmark": (BenchmarkConfig, "s1jax.decoding.benchmark"),
    "serve": (ServeConfig, "s1jax.serving.serve"),
    "quantise": (QuantiseConfig, "s1jax.decoding.quantise"),
}
"""Of each mode, its configuration and the module whose function of the mode's name takes it."""
PLANS = {"generate": "s1jax.planning.generation", "evaluate": "s1jax.planning.evaluation"}
"""Of modes that may be planned, the module whose function `plan` does."""


def main(words: list[str]) -> int:
    """Parse the command line, run the mode, and return the exit status."""
    if not words or words[0] not in MODES:
        print(f"{__doc__}\n\nmodes:")
        for mode, (root, _) in MODES.items():
            print(f"  {mode:<12}{str(root.__doc__).partition(': ')[2]}")
        print("\npython decode.py MODE --help lists the keys of a mode.")
        return 0 if words in (["--help"], ["-h"]) else 2
    mode, *rest = words
    root, module = MODES[mode]
    config = command_line(root, rest, f"python decode.py {mode} [CONFIG.yaml] section.key=value ...")
    planned = mode in PLANS and config.plan.target
    if planned:
        use_compilers_only()
        mode, module = "plan", PLANS[mode]
    else:
        use_most_of_memory()
        # Imported here because it is slow: --help and mistakes in the keys answer at once.
        from s1jax.compilation_cache import keep_compilations

        keep_compilations()
    from s1jax.command import exit_status

    def run() -> int:
        result = getattr(importlib.import_module(module), mode)(config)
        return int(result) if planned else 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
