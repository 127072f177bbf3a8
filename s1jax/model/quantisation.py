"""Weights of few bits: symmetric integers, and what those of an output, or of a group of its inputs, are multiplied by.

int8 has one scale for an output, int4 one for each group of 128 of its inputs. They are widened inside the products.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from s1jax.config import Quantisation
from s1jax.model.adapter import MergedTensor
from s1jax.model.safetensors_files import StoredTensor

_GROUP = 128
GREATEST = {"int8": 127, "int4": 7}
"""Integers of either sign."""
_TRIED: dict[Quantisation, tuple[float, ...]] = {"int8": (127,), "int4": (-8, -9, -10, -11)}
"""What the number of a group that is farthest from 0 is to become; cut, where that is beyond the integers."""


def num_groups(quantisation: Quantisation, inputs: int) -> int:
    """How many scales an output has; inputs that are no multiple of 128 are divided into equal groups of less."""
    return 1 if quantisation == "int8" else inputs // math.gcd(_GROUP, inputs)


def quantise(rows: np.ndarray, quantisation: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Integers (outputs, inputs) and float32 scales (outputs, groups) of float32 rows.

    Of the scales that are tried for a group, the one whose integers have the least squared error. Where a row is not
    finite, its scale is not.
    """
    groups = rows.reshape(len(rows), num_groups(quantisation, rows.shape[1]), -1)
    highest, lowest = groups.max(-1, keepdims=True), groups.min(-1, keepdims=True)
    farthest = np.where(highest < -lowest, lowest, highest)
    tried = [farthest / np.float32(target) for target in _TRIED[quantisation]]
    scales, whole = tried[0], _rounded(groups, tried[0], quantisation)
    if len(tried) > 1:
        least = _squared_error(groups, whole, scales)
    for others in tried[1:]:
        other_whole = _rounded(groups, others, quantisation)
        error = _squared_error(groups, other_whole, others)
        better = error < least
        whole, scales = np.where(better, other_whole, whole), np.where(better, others, scales)
        least = np.minimum(error, least)
    return whole.reshape(rows.shape).astype(jnp.dtype(quantisation)), scales[..., 0]


def _rounded(groups: np.ndarray, scales: np.ndarray, quantisation: Quantisation) -> np.ndarray:
    limits = jnp.iinfo(jnp.dtype(quantisation))
    # A group of zeros has the scale 0.
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.isfinite(scales) & (scales != 0))
    with np.errstate(invalid="ignore", over="ignore"):
        whole = groups * inverse
        np.rint(whole, out=whole)
        return np.clip(whole, limits.min, limits.max, out=whole).astype(np.int8)


def _squared_error(groups: np.ndarray, whole: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Of each group."""
    errors = whole * scales
    errors -= groups
    return np.einsum("ogi,ogi->og", errors, errors)[..., None]


class Quantiser:
    """Makes integers and scales of a checkpoint's tensor, row by row, each row once for both."""

    def __init__(self, tensor: StoredTensor | MergedTensor, quantisation: Quantisation):
        self.tensor, self.quantisation = tensor, quantisation
        outputs, inputs = tensor.shape
        self._scales = np.zeros((outputs, num_groups(quantisation, inputs)), np.float32)
        self._known = np.zeros(outputs, bool)

    def integers(self, start: int, stop: int) -> np.ndarray:
        """Of rows from `start` up to `stop`."""
        rows = self.tensor.read_rows(start, stop).astype(np.float32)
        whole, self._scales[start:stop] = quantise(rows, self.quantisation)
        self._known[start:stop] = True
        return whole

    def scales(self, start: int, stop: int) -> np.ndarray:
        """Of rows from `start` up to `stop`."""
        if not self._known[start:stop].all():
            self.integers(start, stop)
        return self._scales[start:stop]


@dataclass(frozen=True)
class QuantisedTensor:
    """The integers that are made of a tensor, or their scales; read like a `StoredTensor`."""

    made: Quantiser
    of_scales: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs or groups)."""
        outputs, inputs = self.made.tensor.shape
        return outputs, num_groups(self.made.quantisation, inputs) if self.of_scales else inputs

    @property
    def row_bytes(self) -> int:
        """Of one output, while it is made."""
        return 4 * self.made.tensor.shape[1]

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of what is read."""
        return np.dtype(np.float32) if self.of_scales else jnp.dtype(self.made.quantisation)

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows from `start` up to `stop`, as `StoredTensor.read_rows`."""
        made = (self.made.scales if self.of_scales else self.made.integers)(start, stop)
        if out is None:
            return made
        out.reshape(made.shape)[...] = made
        return out
