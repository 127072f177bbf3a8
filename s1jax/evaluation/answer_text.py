"""The text of an answer: found in what a model wrote, freed of formatting, and the letter that it chooses."""

import re

_ANSWER_OPENING, _TURN_OPENING = "<|im_start|>answer\n", "<|im_start|>"
_LABEL = re.compile(r"Answer\**:\**(?:\s|\\\[|\$\$(?=\s)|\*\*(?=\s))*(.*)")
_SAID = re.compile(
    r"\b(?:answer|choice|option)(?: (?:is|equals|would be)(?! not\b)| =|:)\**:?(?:\s|\\\[|\$\$(?=\s)|\*\*(?=\s))*(.+)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$.]*(?:,|\band\b|\bor\b)+[\s$]*")
_SENTENCE = re.compile(r"[A-Za-z]{2}\s+[A-Za-z]{2}")
_CONCLUSION = re.compile(r"^\W*[A-J][).:]|(?i:\b(?:is|are|be|equals?|so|thus|hence|therefore|pick|choose|fits)\b)")

_STYLE = r"\\(?:text|math)(?:rm|bf|it|sf|tt|normal|up|md)?|\\(?:operatorname|mbox|emph|underline|bf|bm|boldsymbol)\*?"
STYLED = re.compile(rf"(?:{_STYLE})\s*\{{([^{{}}]*)\}}")
EMPHASIS = re.compile(
    r"(?<![\w)}])\*\*+|\*\*+(?![\w({]|\\[A-Za-z])|__+|`|^[\s#>]+|(?<![\w*\s)}\]])\*(?=\S)|(?<=[^\s*])\*(?![\w*\s({\\])",
    re.MULTILINE,
)

_MARKS = re.compile(r"\\[()\[\]]|\\[a-z]+(?=\W)|[${}\"“”\\]|\\[,;! ]")
_SMALL = re.compile(
    r"^\W*[a-j](?=\W*$|[).:])|\([a-j]\)|(?<=\boption )[a-j]\b|(?<=\bchoice )[a-j]\b|(?<=is )[a-j](?=\W*$)"
)
_LETTER = re.compile(r"(?<![\w'’^])(\(|\[)?\s?([A-J])(?![\w'’^(])(?:\s?[)\]])?")
_POINTS = re.compile(
    r"(?:answer|option|choice|correct|choose|chose|pick|select|go with)(?:\s+(?:is|would be|option))*\W*$"
)
_LEADS = re.compile(r"(?:\b(?:is|be|so|thus|hence|therefore|only|leaves|means)|⇒|→|=>|arrow)[\s,:*]*$")
_DENIED_BEFORE = re.compile(r"(?:\bnot|n't|\bthan|\bnor|\bneither|\bexclude|\beliminate|\breject)(?: option)?[\s(]*$")
_DENIED_AFTER = re.compile(r"\s*(?:is|are|was|seems)?\s*(?:not\b|wrong|incorrect|false|impossible|n't)")
_CONFIRMED = re.compile(r"[\s.]*(?:is|are)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|answer|true)|\s*fits")
_ALSO = re.compile(r"\s*(?:,|/|&|or|and)+\s*\(?[A-J](?!\w)")


_SEEN = 1_000
"""Characters at both ends of a text in which a letter is looked for."""


def extract_answer(text: str) -> str | None:
    """The answer in a model's text; None if there is none.

    What follows the last `<|im_start|>answer` line, else the last `<|im_start|>` line, counts; in it the last
    `\\boxed{...}`, else what follows the last "Answer:", else the last "answer is", else a last line that is no more
    than an answer, or concludes.
    """
    if _ANSWER_OPENING in text:
        text = text.rpartition(_ANSWER_OPENING)[2]
    elif _TURN_OPENING in text:
        text = text.rpartition(_TURN_OPENING)[2].partition("\n")[2]
    text = text.replace("<|im_end|>", "")
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_LABEL, _SAID):
        found = pattern.findall(text)
        if found:
            return _bare(found[-1])
    lines = text.strip().splitlines()
    if lines and "boxed" not in lines[-1] and (_CONCLUSION.search(lines[-1]) or not _SENTENCE.search(lines[-1])):
        return _bare(lines[-1])
    return None


def _bare(line: str) -> str | None:
    line = EMPHASIS.sub("", line).strip()
    return None if line in ("", "\\[", "$$") else line


def _last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces are closed, and of those that a list joins to it."""
    closing, opened = {}, []
    for match in re.finditer(r"\\.|[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    contents: list[str] = []
    after = None
    for match in reversed(list(_BOX.finditer(text))):
        end = closing.get(match.end() - 1)
        if end is not None:
            if after is not None and not _BETWEEN_BOXES.fullmatch(text, end + 1, after):
                break
            contents.insert(0, text[match.end() : end].strip())
            after = match.start()
    return ", ".join(contents) or None


def chosen_letter(text: str) -> tuple[str | None, str | None]:
    """The letter A to J that the text chooses; None, and why, if it is none or more than one."""
    plain = text if len(text) < 2 * _SEEN else f"{text[:_SEEN]} {text[-_SEEN:]}"
    while (unstyled := STYLED.sub(r"\1", plain)) != plain:
        plain = unstyled
    plain = _MARKS.sub(" ", EMPHASIS.sub("", plain)).strip()
    plain = _SMALL.sub(lambda match: match[0].upper(), plain)
    found: dict[int, str] = {}
    """By how clear it is, from 0; of several that are as clear, the last."""
    several = set()
    for match in _LETTER.finditer(plain):
        before, after, letter = plain[: match.start()], plain[match.end() :], match[2]
        alone = not before.strip() and not after.strip(" .")
        word = (
            not match[1]
            and letter in "AI"
            and re.match(r" [a-z]", after)
            and not (_CONFIRMED.match(after) or _ALSO.match(after))
        )
        if word and not re.match(r" (?:because|since|as|is|for)\b", after):
            continue
        if not alone and (re.search(r"\d\s*$|[+*/^]\s*$", before) or re.match(r"\s*[=+*/<>]|-\w", after)):
            continue
        if _DENIED_BEFORE.search(before.lower()) or _DENIED_AFTER.match(after):
            continue
        if _POINTS.search(before.lower()) or _CONFIRMED.match(after) or alone:
            rank = 0
        elif not before.strip() and (match[0][-1] in ")]" or re.match(r"\s*[.:,-]|\s+(?:because|since|as)\b", after)):
            rank = 1
        elif _LEADS.search(before.lower()):
            rank = 2
        else:
            rank = 3
            several.add(letter)
        found[rank] = letter + (after if _ALSO.match(after) else "")
    if not found or (len(several) > 1 and min(found) == 3):
        return None, "more than one letter is named" if found else "no letter is named"
    best = found[min(found)]
    return (best, None) if len(best) == 1 else (None, "more than one letter is named")
