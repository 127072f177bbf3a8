"""What a run started again must have in common with the one that left its output."""

import json
from typing import Any

from s1jax.config_reader import to_dict
from s1jax.jsonl import InputError, is_begun
from s1jax.paths import AnyPath, write_whole


def keep_settings(
    config: Any, free_to_change: tuple[str, ...], output: AnyPath, beside: AnyPath, *, save: bool = True
) -> None:
    """Compare with the configuration that an earlier run of `output` left in the file `beside`; leave this one there.

    Of several processes that compare, one is to `save`. Raises InputError that names the top-level keys that differ,
    but for those in `free_to_change`; WriteError if the file cannot be written, which is then as it was.
    """
    settings = {key: value for key, value in to_dict(config).items() if key not in free_to_change}
    if is_begun(output) and beside.exists():
        before = json.loads(beside.read_text(encoding="utf-8"))
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise InputError(f"{output}: it was written with other values of {', '.join(changed)}: move it away")
    if save:
        write_whole(beside, json.dumps(settings, indent=2) + "\n")
