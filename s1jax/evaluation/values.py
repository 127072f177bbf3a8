"""Whether two formulas have the same value.

math-verify's parser reads them. Fractions, 400 digits, or with variables some points decide, since math-verify's own
comparison errs both ways. Where values do not decide it, its "equal" counts, and its "different" does not.
"""

import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

_DIGITS, _POINT_DIGITS = 400, 100
_APPROXIMATE_PLACES = 4
"""Decimals from which on a number may be meant as an approximation."""
_NORMALIZED = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
_CONVERTED = ConversionConfig(lowercase_symbols=False)


class UndecidedError(ValueError):
    """There is no saying whether they are the same."""


@contextmanager
def asking_sympy(doing: str) -> Iterator[None]:
    """What sympy and the parser raise for a text is of every type, their own and Python's."""
    try:
        yield
    except (UndecidedError, MemoryError, RecursionError):
        raise
    except Exception as error:
        raise UndecidedError(f"{doing}: {type(error).__name__}: {error}".replace("\n", " ")) from error


def read_formula(text: str) -> Any:
    """What sympy makes of a formula in LaTeX; raises UndecidedError."""
    text = re.sub(r"\\approx.*", "", text).strip()
    if re.fullmatch(r"[-+]?\d[\d,]*", text) and (re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+", text) or "," not in text):
        return sympy.Integer(text.replace(",", ""))
    if re.search(r"\d\s+\d|:\s*[^:]+:", text):
        raise UndecidedError("it is not clear what stands between the numbers")
    if text.count(r"\pm") == 1:
        text = ", ".join(text.replace(r"\pm", sign) for sign in ("+", "-")).replace("=+", "=").replace("{+", "{")
    with asking_sympy("it cannot be read"):
        return latex2sympy(
            text, is_real=True, convert_degrees=True, normalization_config=_NORMALIZED, conversion_config=_CONVERTED
        )


def same_value(left: Any, right: Any) -> bool:
    """Whether two numbers, expressions, equations, sets, tuples or matrices are the same; raises UndecidedError."""
    left, right = (_simplest(value) for value in (left, right))
    if isinstance(left, sympy.Eq) != isinstance(right, sympy.Eq):
        equation, value = (left, right) if isinstance(left, sympy.Eq) else (right, left)
        if isinstance(equation.lhs, sympy.Symbol):
            return same_value(equation.rhs, value)
        raise UndecidedError("one of them is an equation")
    if isinstance(left, sympy.Eq):
        return _same_equation(left, right)
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return left.shape == right.shape and _all_same(list(left), list(right))
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return _same_expression(left, right)
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        opened = [(interval.left_open, interval.right_open) for interval in (left, right)]
        return opened[0] == opened[1] and _all_same([left.start, left.end], [right.start, right.end])
    if isinstance(left, sympy.Union) and isinstance(right, sympy.Union):
        return _same_set(left.args, right.args)
    items = _items(left), _items(right)
    if items[0] is not None and items[1] is not None:
        if isinstance(left, sympy.FiniteSet) and isinstance(right, sympy.FiniteSet):
            return _same_set(items[0], items[1])
        if isinstance(left, sympy.FiniteSet) == isinstance(right, sympy.FiniteSet):
            return _all_same(items[0], items[1])
        if not _same_set(items[0], items[1]):
            return False
        raise UndecidedError("one is in order, the other is not")
    if any(isinstance(value, sympy.Expr) and not value.free_symbols for value in (left, right)):
        return False
    if isinstance(left, sympy.Set) and isinstance(right, sympy.Set) and not left.free_symbols | right.free_symbols:
        with asking_sympy("they cannot be compared"):
            if False in (left.is_subset(right), right.is_subset(left)):
                return False
    # Its own time limit is a signal, which does not interrupt a long computation in C; the pool's ends the process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # It warns of the limit that is off.
    with asking_sympy("they cannot be compared"):
        if verify(left, right, timeout_seconds=None, raise_on_error=True):
            return True
    raise UndecidedError("math-verify takes them for different, and their values do not say so")


def _simplest(value: Any) -> Any:
    """A set for inequalities in one variable, the only element for a set, and for x = S what x is in."""
    inequality = (Relational, sympy.And, sympy.Or)
    if isinstance(value, sympy.FiniteSet) and value.args and all(_is_inequality(item) for item in value.args):
        value = sympy.Or(*value.args)
    if isinstance(value, inequality) and not isinstance(value, sympy.Eq) and len(value.free_symbols) == 1:
        with asking_sympy("an inequality cannot be solved"):
            return value.as_set()
    if isinstance(value, sympy.FiniteSet) and len(value.args) == 1:
        return value.args[0]
    if isinstance(value, sympy.Eq) and isinstance(value.rhs, (sympy.Set, sympy.Tuple)):
        return value.rhs
    return value


def _is_inequality(value: Any) -> bool:
    return isinstance(value, Relational) and not isinstance(value, sympy.Eq)


def _items(value: Any) -> Sequence[Any] | None:
    if isinstance(value, sympy.Interval):
        return [value.start, value.end] if value.left_open and value.right_open else None
    return value.args if isinstance(value, (sympy.FiniteSet, sympy.Tuple)) else None


def _all_same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(same_value(a, b) for a, b in zip(left, right, strict=True))


def _same_set(left: Sequence[Any], right: Sequence[Any]) -> bool:
    rest = list(right)
    for item in left:
        match = next((at for at, other in enumerate(rest) if same_value(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _same_expression(left: Any, right: Any) -> bool:
    places = [
        max((len(str(number).partition(".")[2].rstrip("0")) for number in value.atoms(sympy.Float)), default=0)
        for value in (left, right)
    ]
    left, right = (_exact(value) for value in (left, right))
    if left.free_symbols | right.free_symbols:
        return _same_at_points(left, right)
    fractions = left.is_Rational and right.is_Rational
    same = bool(left == right) if fractions else _same_number(left, right, _DIGITS)
    if not same and max(places) >= _APPROXIMATE_PLACES and 0 in places:
        exact = right if places[0] else left
        terminates = exact.is_Rational and pow(10, exact.q.bit_length(), exact.q) == 0
        with asking_sympy("it has no value"):
            if not terminates and abs(sympy.N(left - right, 30)) <= sympy.Rational(1, 10 ** max(places)):
                raise UndecidedError("they agree as far as the decimals of one of them go")
    return same


def _exact(value: Any) -> Any:
    """Decimals as fractions, and i as the imaginary unit."""
    with asking_sympy("it has no value"):
        decimals = {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
        value = value.xreplace({**decimals, sympy.Symbol("i", real=True): sympy.I}).doit()
    if value.has(sympy.nan, sympy.zoo) or value.atoms(AppliedUndef):
        raise UndecidedError("it has no value")
    return value


def _same_number(left: Any, right: Any, digits: int) -> bool:
    """Whether two numbers have the same first digits; what is 0 to more than twice as many is 0."""
    if left.is_infinite or right.is_infinite:
        return bool(left == right)
    with asking_sympy("it has no value"):
        first, second = (sympy.N(value, digits, maxn=3 * digits) for value in (left, right))
        size = max(abs(first), abs(second))
        if not all(number.is_number and number.is_finite for number in (first, second)):
            raise UndecidedError("it has no value")
        return bool(abs(first - second) <= size * sympy.Float(10) ** -(digits - 10)) or bool(
            size < sympy.Float(10) ** -(2 * digits)
        )


def _same_at_points(left: Any, right: Any) -> bool:
    """Whether they agree wherever both are real, or with an i in one of them, have values."""
    rng = random.Random(0)
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    is_complex = left.has(sympy.I) or right.has(sympy.I)
    compared = 0
    for attempt in range(30):
        # Positive, of both signs, and whole, since powers of negative numbers have real values only there.
        low, high, bottom = ((1, 900, 97), (-900, 900, 97), (1, 12, 1))[attempt % 3]
        point = {symbol: sympy.Rational(rng.randint(low, high), bottom) for symbol in symbols}
        with asking_sympy("it has no value"):
            values = [sympy.N(side.subs(point), _POINT_DIGITS + 20) for side in (left, right)]
        if not all(value.is_number and value.is_finite and (is_complex or value.is_real) for value in values):
            continue
        if not _same_number(values[0], values[1], _POINT_DIGITS):
            return False
        compared += 1
        if compared == 9:
            return True
    raise UndecidedError("too few points were found where both have a value")


def _same_equation(left: Any, right: Any) -> bool:
    """Whether one is a multiple of the other; those that are not may still have the same solutions."""
    if left.lhs == right.lhs and isinstance(left.lhs, sympy.Symbol):
        return same_value(left.rhs, right.rhs)
    sides = [_exact(equation.lhs - equation.rhs) for equation in (left, right)]
    with asking_sympy("an equation cannot be compared"):
        ratio = sympy.cancel(sides[0] / sides[1])
        if ratio.is_number:
            return bool(ratio.is_finite and ratio.is_nonzero)
        degrees = [sympy.Poly(side, *sorted(side.free_symbols, key=str)).total_degree() for side in sides]
    if sides[0].free_symbols != sides[1].free_symbols or degrees == [1, 1]:
        return False
    raise UndecidedError("the equations are no multiples of each other")
