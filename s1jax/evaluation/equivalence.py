"""Whether two answers are the same: as text, words, times of day, numbers in a base, or formulas and their units."""

import re

from s1jax.evaluation.plain_text import cleaned
from s1jax.evaluation.values import UndecidedError, asking_sympy, read_formula, same_value

_LONGEST, _MOST_DIGITS = 500, 100_000
"""Characters that are read: those that are no digits, and all."""

_QUANTITY = re.compile(
    r'(?P<lead>(?:"[^"]*"[\s,:]*)*)(?P<value>[^"]+?)\s*(?P<mark>\\%|\^\\circ|)'
    r'\s*(?P<unit>(?:"[^"]*"(?:\^?\{?-?\d\}?)?[\s/,.;:]*)*)'
)
_WORDS = re.compile(r'(?:"[^"]*"[\s,.-]*)+')
_NAMED = re.compile(r'[^=<>,\d]*"[^=<>,\d]*=(?!.*=)')
_STATED = re.compile(
    r"(?:is|are|be|equals?|has|have|had|was|were|costs?|gets?|needs?|makes?|takes?|sells?|answer)\W*", re.IGNORECASE
)
_SPELLED = re.compile(
    r"\b(?:half|twice|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty|dozen|hundred"
    r"|thousand|[mbtr]+illion|none|infinit\w*|solutions?)\b"
)
_QUALIFIED = re.compile(r"\b(?:not?|than|least|most|between|except|without|or|more|less|negative|minus)\b|n't")
_NAME = re.compile(r"(?:[A-Za-z\\_{}(),'|]|(?<=_)\d|(?<=[{(,])\d|\s)+")
_EQUALS = re.compile(r"(?<![<>!\\])=")
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_LOG = re.compile(r"\\log(?!_)")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})\s*(?:([ap])\.?\s?m\.?|(noon)|(midnight)|)", re.IGNORECASE)
_IN_BASE = re.compile(r"(\w+)_\{?(\d+)\}?")


def equivalent(reference: str, found: str) -> bool:
    """Whether the answer is the reference; raises UndecidedError."""
    texts = []
    for name, text in (("reference", reference), ("answer", found)):
        if len(re.sub(r"[\d,]", "", text)) > _LONGEST or len(text) > _MOST_DIGITS:
            raise UndecidedError(f"the {name} has {len(text):,} characters, and that many are not read")
        texts.append(cleaned(text))
    left, right = texts
    if not left or not right:
        raise UndecidedError("there is nothing to read")
    if left == right:
        return True
    for compare in (_same_words, _same_time, _same_in_base):
        verdict = compare(left, right)
        if verdict is not None:
            return verdict
    same = _same_quantity(left, right)
    if not same and left.lower() == right.lower():
        raise UndecidedError("they differ in capital letters only")
    if not same and bool(_LOG.search(left)) != bool(_LOG.search(right)):
        raise UndecidedError("a logarithm has no base")
    return same


def _same_words(left: str, right: str) -> bool | None:
    """None if neither consists of words."""
    parts = [
        re.split(r",|\band\b", text.lower().replace('"', " ")) if _WORDS.fullmatch(text) else []
        for text in (left, right)
    ]
    words = [", ".join(sorted(" ".join(re.findall(r"[^\s.]+", part)) for part in parts_of)) for parts_of in parts]
    if not any(words):
        return None
    if not all(words):
        formula = right if words[0] else left
        if _LETTERS.search(formula) or re.search(r"\"|emptyset|infty|\\\{", formula) or _SPELLED.search("".join(words)):
            raise UndecidedError("one of them is in words")
        return False
    shorter, longer = sorted(words, key=len)
    if shorter != longer and (f" {shorter} " in f" {longer} " or (len(longer) < 4 and sorted(left) == sorted(right))):
        raise UndecidedError("the words of one are among the other's")
    return shorter == longer


def _same_time(left: str, right: str) -> bool | None:
    """None if either is no time of day. One that does not name the half of the day agrees with both."""
    times = [match for text in (left, right) if (match := _CLOCK.fullmatch(text.replace('"', "").strip()))]
    if len(times) < 2:
        return None
    halves = [(time[3] or ("p" if time[4] else "a" if time[5] else "")).lower() for time in times]
    hours = [
        int(time[1]) % 12 + 12 * (half == "p") if half else int(time[1])
        for time, half in zip(times, halves, strict=True)
    ]
    either = bool(halves[0]) != bool(halves[1]) and min(hours[at] for at in (0, 1) if not halves[at]) < 13
    return times[0][2] == times[1][2] and (hours[0] - hours[1]) % (12 if either else 24) == 0


def _same_in_base(left: str, right: str) -> bool | None:
    """None if neither names the base that its digits are in."""
    numbers = [_IN_BASE.fullmatch(text.replace(" ", "")) for text in (left, right) if text[0].isdigit()]
    if not any(numbers):
        return None
    if len(numbers) < 2 or not numbers[0] or not numbers[1]:
        raise UndecidedError("one of them names a base")
    with asking_sympy("a number cannot be read in its base"):
        return int(numbers[0][1], int(numbers[0][2])) == int(numbers[1][1], int(numbers[1][2]))


def _same_quantity(left: str, right: str) -> bool:
    """Formulas, with words before them and units behind."""
    values, marks, units = [], [], []
    for text in (left, right):
        quantity = _QUANTITY.fullmatch(_NAMED.sub("", text))
        if quantity is None:
            raise UndecidedError("it is neither words nor a formula")
        lead = quantity["lead"].replace('"', " ").split()
        beside = (quantity["lead"] + quantity["unit"]).lower()
        if (lead and not _STATED.fullmatch(lead[-1])) or _QUALIFIED.search(beside) or _SPELLED.search(beside):
            raise UndecidedError("there are words beside it")
        # The angle of a function is no quantity in degrees.
        angle = quantity["mark"] == r"^\circ" and re.search(
            r"\\[a-z]+", re.sub(r"\\(?:frac|sqrt|pi|angle)", "", quantity["value"])
        )
        values.append(quantity["value"] + (quantity["mark"] if angle else ""))
        marks.append("" if angle else quantity["mark"])
        units.append(re.sub(r"s\b|[\s\"{}^.,]", "", quantity["unit"].lower()))
    same = _same_formula(*values)
    if not same and marks[0] != marks[1] and "" in marks:
        scale = r"\frac{1}{100}" if r"\%" in marks else r"\frac{\pi}{180}"
        scaled = [f"({value})*{scale}" if mark else value for value, mark in zip(values, marks, strict=True)]
        same = _same_formula(*scaled)
    elif same and marks[0] != marks[1] and "" not in marks:
        raise UndecidedError("one is a percentage, the other an angle")
    if all(units) and units[0] != units[1]:
        raise UndecidedError("they are in different units")
    if any(units) and not same and any(_LETTERS.search(value) for value in values):
        raise UndecidedError("letters may be a unit")
    return same


def _same_formula(left: str, right: str) -> bool:
    """Also of a name and its value: x = 3, f(x) = 3, x in {3} and 2 + 1 = 3 are 3."""
    texts = [re.sub(r"^[A-Za-z]\s*\\in(?![a-z])", "", text) for text in (left, right)]
    sides = [_EQUALS.split(text) if "," not in text or text.count("=") == 1 else [text] for text in texts]
    names = [side[0].replace(" ", "") if len(side) > 1 and _NAME.fullmatch(side[0]) else "" for side in sides]
    for at in (0, 1):
        computed = len(sides[at]) > 1 and not any(_LETTERS.search(side) for side in sides[at])
        if computed or (names[at] and (names[1 - at] == names[at] or len(sides[1 - at]) == 1)):
            texts[at] = sides[at][-1]
    return same_value(*map(read_formula, texts))
