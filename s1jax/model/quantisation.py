"""Weights of few bits: symmetric integers, and what those of an output, or of a group of its inputs, are multiplied by.

int8 has one scale for an output, int4 one for each group of 128 of its inputs. They are widened inside the products.
They are made while a checkpoint is read, or are what it stores: two int4 share a byte, the first has its lower half. A
stored row is (1, bytes): programs that know nothing of scales then refuse the weight, for its third dimension.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from s1jax.config import Quantisation
from s1jax.model.adapter import MergedTensor
from s1jax.model.safetensors_files import StoredTensor

_GROUP = 128
GREATEST = {"int8": 127, "int4": 7}


def num_groups(quantisation: Quantisation, inputs: int) -> int:
    """How many scales an output has; inputs that are no multiple of 128 are divided into equal groups of less."""
    return 1 if quantisation == "int8" else inputs // math.gcd(_GROUP, inputs)


def quantise(rows: np.ndarray, quantisation: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Integers (outputs, inputs) and float32 scales (outputs, groups) of float32 rows.

    The integers are the nearest, and exact for the greatest of a group. Where a row is not finite, its scale is not.
    """
    groups = rows.reshape(len(rows), num_groups(quantisation, rows.shape[1]), -1)
    scales = np.maximum(groups.max(-1), -groups.min(-1)) / np.float32(GREATEST[quantisation])
    # A group of zeros has the scale 0.
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.isfinite(scales) & (scales > 0))
    with np.errstate(invalid="ignore"):
        whole = groups * inverse[..., None]
        np.rint(whole, out=whole)
        integers = whole.astype(np.int8)
    return integers.reshape(rows.shape).astype(jnp.dtype(quantisation)), scales


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
    def stored(self) -> jax.ShapeDtypeStruct:
        """How a checkpoint stores it."""
        if self.of_scales:
            return jax.ShapeDtypeStruct(self.shape, np.float32)
        return stored_integers(self.made.quantisation, self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`, as `StoredTensor.read_rows`."""
        return (self.made.scales if self.of_scales else self.made.integers)(start, stop)


@dataclass(frozen=True)
class PackedTensor:
    """Integers of four bits that a checkpoint stores; read like a `StoredTensor`, each in a byte."""

    stored: StoredTensor
    inputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs)."""
        return self.stored.shape[0], self.inputs

    @property
    def row_bytes(self) -> int:
        """Of one output, once it is read."""
        return self.inputs

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`, as `StoredTensor.read_rows`."""
        pairs = self.stored.read_rows(start, stop)[:, 0]
        whole = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(len(pairs), -1)
        return np.ascontiguousarray(whole[:, : self.inputs]).view(jnp.int4)


def stored_integers(quantisation: Quantisation, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """How a checkpoint stores integers of the shape (outputs, inputs)."""
    outputs, inputs = shape
    if quantisation == "int8":
        return jax.ShapeDtypeStruct((outputs, 1, inputs), np.int8)
    return jax.ShapeDtypeStruct((outputs, 1, (inputs + 1) // 2), np.uint8)


def to_stored(rows: np.ndarray) -> np.ndarray:
    """Rows of integers as a checkpoint stores them; others as they are."""
    if rows.dtype == np.int8:
        return rows[:, None]
    if rows.dtype != jnp.int4:
        return rows
    halves = rows.view(np.uint8) & 15
    pairs = halves[:, ::2].copy()
    pairs[:, : halves.shape[1] // 2] |= halves[:, 1::2] << 4
    return pairs[:, None]


def from_stored(
    stored: StoredTensor, quantisation: Quantisation, shape: tuple[int, ...]
) -> StoredTensor | PackedTensor:
    """Stored integers as a tensor of their shape (outputs, inputs)."""
    return stored._replace(shape=shape) if quantisation == "int8" else PackedTensor(stored, shape[1])
