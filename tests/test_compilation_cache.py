import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax
from s1jax.compilation_cache import keep_compilations
keep_compilations()
print(jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(3)))
"""


def run(home: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def kept(home: Path) -> dict[Path, bytes]:
    """The compiled programs after a run, which says nothing but its result."""
    done = run(home)
    assert (done.stdout.strip(), done.stderr) == ("[1 3 5]", "")
    return {path: path.read_bytes() for path in sorted(home.rglob("*-cache"))}


def test_a_program_that_was_not_written_to_its_end_is_written_anew(tmp_path: Path) -> None:
    first = kept(tmp_path)
    assert first
    for number, (path, content) in enumerate(first.items()):
        path.write_bytes(content[: number % 2 * len(content) // 2])
    assert kept(tmp_path).keys() == first.keys()
    # A third run reads what the second has written.
    times = {path: path.stat().st_mtime_ns for path in first}
    third = kept(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in third} == times
    assert all(len(content) > 100 for content in third.values())


def test_where_nothing_can_be_kept_programs_run() -> None:
    assert run(Path("/dev/null/home")).stdout.strip() == "[1 3 5]"
