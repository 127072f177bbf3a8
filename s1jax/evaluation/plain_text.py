"""An answer's text as LaTeX that math-verify reads: signs as commands, fonts gone, words and units between quotes."""

import re

from s1jax.evaluation.answer_text import EMPHASIS, STYLED

_SIGNS = {
    **dict(zip("−–×·⋅∗÷⁄€£", "--****//  ", strict=True)),
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∈": r"\in ",
    "±": r"\pm ",
    "°": r"^\circ ",
    "½": r"\frac{1}{2}",
    "²": "^{2}",
    "³": "^{3}",
    **dict.fromkeys("\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}~\t\n", " "),
}
_NAMES = r"alpha|beta|gamma|delta|theta|lambda|sigma|omega|pi|infty|sqrt|(?:arc)?(?:sin|cos|tan|sec|csc|cot)|ln|log|exp"
_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"[{''.join(_SIGNS)}]", lambda match: _SIGNS[match[0]]),
        (r"(?<!\\)\\!|\\(?:left|right|[bB]igg?[lrm]?|displaystyle)(?![a-z])\.?", ""),
        (r"(?<!\\)\\[()\[\]]|\\?\$", " "),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])", " "),
        (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/]| *\\frac)", lambda match: match[0].replace(" ", "")),
        (r"\\lbrace(?![a-z])", r"\\{"),
        (r"\\rbrace(?![a-z])", r"\\}"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\{\s*([<>=+-])\s*\}", r"\1"),
        (r"\s*\^\s*(?:\{\s*)?\\circ\s*\}?|\\degree(?![a-z])|\s*\bdegrees?\b", r"^\\circ "),
        (r"\s*\b(?:percent|pct)\b|(?<!\\)%", r"\\%"),
        (r"\\infinity|(?<!\\)\binf(?:inity)?\b", r"\\infty "),
        (r"\*\*", "^"),
        (r"(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])", ""),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"(?<=\d)[eE]([-+]?\d+)(?![\d.])", r"*10^{\1}"),
        (r"([\^_])([-+]?\d+)", r"\1{\2}"),
        (r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s+(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}"),
        (r"(?<![\w.^}])(\d{1,9}) +(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),
        (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", lambda match: _repeating(*match.groups())),
        (r"\((\d+)\)\s*_", r"\1_"),
        (rf"(?<![\\A-Za-z])({_NAMES})(?![A-Za-z])", r"\\\1"),
        (r"(?<=\d)\s*\bto\b\s*(?=\d)|\\colon(?![a-z])", ":"),
        (r"(?<![\\\w])(?:and|or)(?!\w)", ","),
        (r",(\s*,)+", ","),
    )
]
_UNITS = "k?m/[hs]|[cmk]?m|[mk]?g|s|min|h|hr|ft|in|lb|oz|[mM]?L|k?J|k?W|k?N|[kMG]?Hz|[kMG]?eV|mph|V"
_SHORT = "is|in|of|at|no|so|to|we|it|as|by|be|an|on|he|do|am|pm"
_WORD = re.compile(
    rf"(?<![\\A-Za-z])(?<!begin\{{)(?<!end\{{)(?:[A-Za-z][A-Za-z'’-]{{3,}}|(?<![^\s,])(?:[A-Za-z]{{3}}|(?:{_SHORT})(?=\s)|[Nn][Oo](?=\s|$)|[AaI](?=\s+[a-z]{{2}}))(?![^\s,.:])"
    rf"|(?<=\d )(?:{_UNITS})(?=[/^\s.]|$)|(?<=\d)(?:[cmk]m|kg|mg|am|pm|mph)(?=[/^\s.]|$))(?![A-Za-z])"
)


def cleaned(text: str) -> str:
    """The answer itself; words and units are in quotes."""
    text = EMPHASIS.sub("", re.sub(r"\\f?box(?:ed)?\s*(?=\{)|[\"“”]", " ", text)).strip().rstrip(".,;:? ")
    while (plainer := STYLED.sub(_unstyled, text)) != text:
        text = plainer
    for pattern, replacement in [*_REWRITTEN, (_WORD, _quoted)]:
        # What is in quotes already stays as it is.
        text = "".join(
            part if part.startswith('"') else pattern.sub(replacement, part) for part in re.split(r"(\"[^\"]*\")", text)
        )
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;:? ").strip()


def _quoted(match: re.Match[str]) -> str:
    return f'"{match[0]}"'


def _unstyled(match: re.Match[str]) -> str:
    """Words in quotes; what else fonts are put on without them."""
    content = match[1].strip()
    after_number = match.string[: match.start()].rstrip(" \\,;:!~")[-1:].isdigit()
    if re.fullmatch(r"and|or", content):
        return " , "
    if re.fullmatch(rf"{_NAMES}|percent|degrees?", content) or re.search(r"\d|[\\^$%°]", content):
        return f" {match[1]} "
    return f' "{content}"' if len(content) > 1 or (after_number and re.fullmatch(_UNITS, content)) else content


def _repeating(start: str, places: str, again: str) -> str:
    """The fraction that a decimal is whose last digits repeat."""
    top = int(start + places + again) - int(start + places or 0)
    return rf"\frac{{{top}}}{{{(10 ** len(again) - 1) * 10 ** len(places)}}}"
