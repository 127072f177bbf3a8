"""How a command ends, alone or as one of several processes."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator

import jax


def exit_status(run: Callable[[], int]) -> int:
    """The status that `run` returns; an error that is not a mistake in the program ends with status 1 and one line.

    Raises SystemExit for such an error, and ends as `errors_end_all` does.
    """
    with errors_end_all():
        try:
            return run()
        except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)


@contextlib.contextmanager
def errors_end_all() -> Iterator[None]:
    """After an error, one of several processes that have one model ends at once, so that the others notice.

    The orderly way out waits for the others, and they wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized() and not (isinstance(error, SystemExit) and not error.code):
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        raise
