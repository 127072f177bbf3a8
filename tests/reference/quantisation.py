"""Symmetric integers and their scales, one number at a time."""

import numpy as np

GREATEST = {"int8": 127, "int4": 7}


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
            scale = max(abs(float(value)) for value in of_group) / GREATEST[quantisation]
            scales[output, first // group] = scale
            for i, value in enumerate(of_group):
                integers[output, first + i] = round(float(value) / scale) if scale else 0
    return integers, scales


def widened(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weight that they stand for, (outputs, inputs), in float64."""
    outputs, inputs = integers.shape
    group = inputs // scales.shape[1]
    return np.array([[integers[o, i] * float(scales[o, i // group]) for i in range(inputs)] for o in range(outputs)])
