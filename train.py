"""Supervised fine-tuning: python train.py CONFIG.yaml section.key=value ... [--plan TARGET]"""

import sys

from s1jax.config_reader import command_line
from s1jax.device_memory import use_most_of_memory
from s1jax.planning.hardware import use_compilers_only
from s1jax.training.config import TrainConfig


def main(words: list[str]) -> int:
    """Parse the command line, train or plan, and return the exit status."""
    config = command_line(TrainConfig, words, "python train.py CONFIG.yaml section.key=value ... [--plan TARGET]")
    if config.plan.target:
        use_compilers_only()
    else:
        use_most_of_memory()
    # Imported here because it is slow: --help and mistakes in the keys answer at once.
    from s1jax.command import exit_status

    def run() -> int:
        if config.plan.target:
            from s1jax.planning.cli import plan

            return plan(config)
        from s1jax.compilation_cache import keep_compilations
        from s1jax.training.loop import train

        keep_compilations()
        return train(config)

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
