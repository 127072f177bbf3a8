"""Make a training set, stage by stage: python -m s1jax.curate STAGE CONFIG.yaml section.key=value ..."""

import sys
from collections.abc import Callable

from s1jax.config_reader import command_line, to_dict
from s1jax.curation.card import STAGES, Entry, add_to_card
from s1jax.curation.config import CurateConfig
from s1jax.locks import exclusive_directory
from s1jax.paths import AnyPath, any_path

_Stage = Callable[[CurateConfig, AnyPath], Entry]

# Stages are imported when they are run: some need libraries that take seconds, or are not installed.


def _collect(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.collect import collect

    return collect(config, output_dir)


def _distill(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.distill import distill

    return Entry(tables={"questions": distill(config.distill, output_dir)})


def _attempt(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.attempt import attempt

    return Entry(tables={name: attempt(name, section, output_dir) for name, section in config.students.items()})


def _grade(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.grade import grade

    return Entry(tables={"answers": grade(config.grade, list(config.students), output_dir)})


def _filter(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.filter import filter_questions

    return filter_questions(config, output_dir)


def _domains(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.domains import domains

    return Entry(tables={"questions": domains(config.domains, output_dir)})


def _select(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.select import select

    return select(config, output_dir)


def _format(config: CurateConfig, output_dir: AnyPath) -> Entry:
    from s1jax.curation.format import format_rows

    return format_rows(config.format, output_dir)


_FUNCTIONS: dict[str, tuple[_Stage, tuple[str, ...], str]] = {
    "collect": (_collect, ("sources", "evaluation_sets"), "questions of the sources, without duplicates and overlaps"),
    "distill": (_distill, ("distill",), "a teacher's reasoning trace and answer for each"),
    "attempt": (_attempt, ("students",), "the students' answers"),
    "grade": (_grade, ("grade",), "whether teacher and students are right"),
    "filter": (_filter, ("filter",), "what is left without failures, bad form, and questions that a student solves"),
    "domains": (_domains, ("domains",), "a model says which field each question left is from; optional"),
    "select": (_select, ("select",), "a few for difficulty and diversity"),
    "format": (_format, ("format",), "training and validation files for train.py"),
}
"""Of each stage: its function, the keys that the card shows, and what comes of it."""


def main(words: list[str]) -> int:
    """Parse the command line, run the stage, add it to the card, and return the exit status."""
    if not words or words[0] not in _FUNCTIONS:
        print(f"{__doc__}\n\nstages, in this order:")
        for stage in STAGES:
            print(f"  {stage:<10}{_FUNCTIONS[stage][2]}")
        print("\npython -m s1jax.curate STAGE --help lists the keys.")
        return 0 if words in (["--help"], ["-h"]) else 2
    stage, *rest = words
    run, keys, _ = _FUNCTIONS[stage]
    config = command_line(CurateConfig, rest, f"python -m s1jax.curate {stage} CONFIG.yaml section.key=value ...")
    output_dir = any_path(config.output_dir)
    try:
        with exclusive_directory(output_dir) as lock:
            entry = run(config, output_dir)
            lock.check()
            settings = to_dict(config)
            add_to_card(output_dir, stage, entry, {key: settings[key] for key in keys})
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for label, count in entry.funnel:
        print(f"{stage}: {count:,} {label}")
    for title, table in entry.tables.items():
        if table:
            print(f"{stage}: {title}: {', '.join(f'{key} {value:g}' for key, value in table.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
