"""The tiny model of the decoding tests serves here too."""

from tests.decoding.conftest import directory, loaded

__all__ = ["directory", "loaded"]
