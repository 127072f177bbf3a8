"""What a run started again must have in common with the one that left its output."""

import json
from pathlib import Path
from typing import Any

from s1jax.config_reader import to_dict
from s1jax.jsonl import InputError


def keep_settings(config: Any, free_to_change: tuple[str, ...], output: Path, beside: Path) -> None:
    """Compare with the configuration that an earlier run of `output` left in the file `beside`; leave this one there.

    Raises InputError that names the top-level keys that differ, but for those in `free_to_change`; also if the file
    cannot be written, which is then as it was.
    """
    settings = {key: value for key, value in to_dict(config).items() if key not in free_to_change}
    if output.exists() and beside.exists():
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise InputError(f"{output}: it was written with other values of {', '.join(changed)}: move it away")
    partial = beside.with_name(beside.name + ".partial")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        partial.replace(beside)
    except OSError as error:
        raise InputError(f"{beside}: {error.strerror}") from None
