"""SIGTERM: the run finishes its step, saves and ends; or, where nothing moves any more, is ended."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

TERMINATED = 143
"""Exit status after SIGTERM, as the shell reports it for a process that the signal ended."""
PATIENCE_SECONDS = 25
"""After SIGTERM, how long nothing may move before the process is ended: clouds wait 30 seconds or more."""
_ONE_SIGNAL_SECONDS = 2
"""Signals so close together are one: schedulers and launchers both pass it on."""


class Termination:
    """While entered, SIGTERM sets `requested` instead of ending the process.

    The first one gives the run time as long as it moves: from one `alive` to the next, PATIENCE_SECONDS; when it has
    begun to save, as long as that takes. A second one ends the process at once. This works while the main thread waits
    for a device or another process: the signal's arrival is seen by a thread.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._saving = False
        self._moved = time.monotonic()

    @property
    def requested(self) -> bool:
        """Whether SIGTERM has come."""
        return self._requested.is_set()

    def alive(self) -> None:
        """Say that the run moves: a step was taken, a file written."""
        self._moved = time.monotonic()

    def saving(self) -> None:
        """Say that the run has seen the request and saves its state, however long that takes."""
        self._saving = True

    def __enter__(self) -> "Termination":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._previous_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._previous_handler = signal.signal(signal.SIGTERM, _leave_to_the_thread)
        threading.Thread(target=self._watch, name="termination", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        self._sender.close()  # Ends the thread.

    def _watch(self) -> None:
        """The interpreter writes each signal's number to the socket, also while the main thread is in compiled code."""
        with self._receiver:
            first = None
            while received := self._receiver.recv(64):
                now = time.monotonic()
                if signal.SIGTERM not in received or (first is not None and now - first < _ONE_SIGNAL_SECONDS):
                    continue
                if first is not None:
                    _end("a second SIGTERM")
                first = now
                self._requested.set()
                threading.Thread(target=self._wait, args=(first,), daemon=True).start()

    def _wait(self, asked: float) -> None:
        while not self._saving:
            if time.monotonic() - max(asked, self._moved) > PATIENCE_SECONDS:
                _end(f"nothing has moved for {PATIENCE_SECONDS} seconds since SIGTERM")
            time.sleep(0.5)


def _leave_to_the_thread(signum: int, frame: FrameType | None) -> None:
    """Python's handler, which runs only when the main thread is back in Python."""


def _end(reason: str) -> None:
    print(f"terminated: {reason}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(TERMINATED)
