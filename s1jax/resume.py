"""What a run started again must have in common with the one that left its output."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from s1jax.config_reader import to_dict
from s1jax.jsonl import InputError, describe, is_begun
from s1jax.paths import AnyPath, write_whole
from s1jax.strict_json import parse_json


def settings_of(config: Any, free_to_change: Collection[str], model: Mapping[str, str]) -> dict[str, Any]:
    """What results depend on: the configuration without the keys in `free_to_change`, and a model's fingerprint."""
    settings = {key: value for key, value in to_dict(config).items() if key not in free_to_change}
    return {**settings, **{f"the model's {name}": found for name, found in model.items()}}


def keep_settings(settings: Mapping[str, Any], output: AnyPath, beside: AnyPath, *, save: bool = True) -> None:
    """Compare with what an earlier run of `output` depended on, as it left it in the file `beside`; leave this one's.

    Of several processes that compare, one is to `save`. Raises InputError that names what differs, WriteError if the
    file cannot be written, which is then as it was.
    """
    settings = json.loads(json.dumps(to_dict(settings)))
    if is_begun(output) and beside.exists():
        try:
            before = parse_json(beside.read_bytes(), allow_nan=True)
        except ValueError as error:
            raise InputError(f"{beside}: {error}: move it away, and {output}") from None
        if not isinstance(before, dict):
            raise InputError(f"{beside}: expected an object, found {describe(before)}: move it away, and {output}")
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            raise InputError(f"{output}: it was written with other values of {', '.join(changed):.500}: move it away")
    if save:
        write_whole(beside, json.dumps(settings, indent=2) + "\n")
