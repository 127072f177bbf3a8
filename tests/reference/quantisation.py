"""Symmetric integers and their scales, one number at a time."""

import numpy as np

TRIED = {"int8": [127], "int4": [-8, -9, -10, -11]}
"""What the number of a group that is farthest from 0 is to become, the positive one of two."""
LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}


def group_of(quantisation: str, inputs: int) -> int:
    """Inputs that share a scale: all, or the largest power of two up to 128 that divides them."""
    group = inputs if quantisation == "int8" else 128
    while inputs % group:
        group //= 2
    return group


def quantise(rows: np.ndarray, quantisation: str) -> tuple[np.ndarray, np.ndarray]:
    """Integers like `rows`, (outputs, inputs), and scales, (outputs, groups)."""
    outputs, inputs = rows.shape
    group = group_of(quantisation, inputs)
    integers, scales = np.zeros(rows.shape, int), np.zeros((outputs, inputs // group), np.float32)
    for output in range(outputs):
        for first in range(0, inputs, group):
            of_group = rows[output, first : first + group]
            best = None
            for target in TRIED[quantisation]:
                scale = float(max(of_group, key=lambda value: (abs(value), value))) / target
                whole = [round(float(value) / scale) if scale else 0 for value in of_group]
                whole = [min(max(value, LIMITS[quantisation][0]), LIMITS[quantisation][1]) for value in whole]
                error = sum((w * scale - float(value)) ** 2 for w, value in zip(whole, of_group, strict=True))
                if best is None or error < best:
                    best, scales[output, first // group] = error, scale
                    integers[output, first : first + group] = whole
    return integers, scales


def widened(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight that they stand for, (outputs, inputs), in float64."""
    outputs, inputs = integers.shape
    group = inputs // scales.shape[1]
    return np.array([[integers[o, i] * float(scales[o, i // group]) for i in range(inputs)] for o in range(outputs)])
