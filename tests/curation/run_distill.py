"""The stage distill in a process of its own: python -m tests.curation.run_distill OUTPUT_DIR SECTION_AS_JSON."""

import json
import sys
from pathlib import Path

from pydantic import TypeAdapter

from s1jax.curation.distill import distill
from s1jax.curation.sections import DistillSection

if __name__ == "__main__":
    directory, section = sys.argv[1:]
    try:
        print(json.dumps(distill(TypeAdapter(DistillSection).validate_json(section), Path(directory))))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
