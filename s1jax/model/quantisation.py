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


def num_groups(quantisation: Quantisation, inputs: int) -> int:
    """How many scales an output has; inputs that are no multiple of 128 are divided into equal groups of less."""
    return 1 if quantisation == "int8" else inputs // math.gcd(_GROUP, inputs)


def quantise(rows: np.ndarray, quantisation: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Integers (outputs, inputs) and float32 scales (outputs, groups) of float32 rows.

    The integers are the nearest, and exact for the greatest of a group. Where a row is not finite, its scale is not.
    """
    groups = rows.reshape(len(rows), num_groups(quantisation, rows.shape[1]), -1)
    scales = np.abs(groups).max(-1) / np.float32(GREATEST[quantisation])
    # A group of zeros has the scale 0.
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.isfinite(scales) & (scales > 0))
    with np.errstate(invalid="ignore"):
        whole = np.rint(groups * inverse[..., None]).astype(np.int8)
    return whole.reshape(rows.shape).astype(jnp.dtype(quantisation)), scales


@dataclass(frozen=True)
class QuantisedTensor:
    """The integers of a checkpoint's tensor, or their scales; read like a `StoredTensor`."""

    tensor: StoredTensor | MergedTensor
    quantisation: Quantisation
    scales: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs or groups)."""
        outputs, inputs = self.tensor.shape
        return outputs, num_groups(self.quantisation, inputs) if self.scales else inputs

    @property
    def row_bytes(self) -> int:
        """Of one output, while it is made."""
        return 4 * self.tensor.shape[1]

    @property
    def numpy_dtype(self) -> np.dtype:
        """Of what is read."""
        return np.dtype(np.float32) if self.scales else jnp.dtype(self.quantisation)

    def read_rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows from `start` up to `stop`, as `StoredTensor.read_rows`."""
        made = quantise(self.tensor.read_rows(start, stop).astype(np.float32), self.quantisation)[self.scales]
        if out is None:
            return made
        out.reshape(made.shape)[...] = made
        return out
