"""Answers whose truth is known by construction: a value in two notations is right, two values that differ are wrong.

Each kind yields families: texts of one value, and of others that are near it. Nothing here uses the grader or a parser.
"""

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb, factorial
from typing import NamedTuple

Family = tuple[list[str], list[str]]
"""Texts of one value, of which the first few are what a reference looks like, and texts of other values."""


class Case(NamedTuple):
    """A model's text, the reference, and whether it is right."""

    kind: str
    text: str
    reference: str
    right: bool


_PRESENTED = (
    r"\boxed{%s}",
    r"Adding both gives $\boxed{%s}$.",
    r"\boxed{17}? No, it has to be \boxed{ %s }.",
    "Answer: %s",
    "Final Answer: %s.",
    "**Answer:** %s",
    "**Final Answer**: **%s**",
    "First I got 17.\n\nAnswer:\n%s\n",
    "Answer: 17\nI was wrong.\nAnswer: %s",
    "so \\boxed{17}<|im_start|>answer\nFinal Answer: %s",
    "We add.\n\nThe answer is %s.",
    "The final answer is: **%s**",
    "%s",
)
_REFERENCES = 3


def labelled_answers(seed: int = 0) -> list[Case]:
    """The whole set, the same for the same seed."""
    cases = []
    for kind in KINDS:
        rng = random.Random(f"{kind.__name__} {seed}")
        for same, near in kind(rng):
            for texts, right in ((same, True), (near, False)):
                for text in texts:
                    cases.append(Case(kind.__name__, _presented(rng, text), rng.choice(same[:_REFERENCES]), right))
    return cases


def _presented(rng: random.Random, text: str) -> str:
    if "\n" in text:
        return text
    # What has marks of its own is not put between further ones, and a word alone is no answer.
    fitting = [frame for frame in _PRESENTED if ("**%s" not in frame or "*" not in text) and frame != "%s"]
    return rng.choice(fitting).replace("%s", text)


def _sparse(rng: random.Random, texts: list[str], count: int) -> list[str]:
    """Some of the texts, the first few always."""
    return texts[:_REFERENCES] + rng.sample(texts[_REFERENCES:], min(count, len(texts) - _REFERENCES))


# fmt: off: each family is a row or two.


def integers(rng: random.Random) -> Iterator[Family]:
    for digits in (1, 2, 3, 3, 4, 5, 7, 10):
        n = rng.randrange(10 ** (digits - 1), 10**digits)
        same = [
            str(n),
            f"{n:03}",
            f"{n:,}",
            f"+{n}",
            f"{n}.0",
            f"${n}$",
            rf"\({n}\)",
            rf"\text{{{n}}}",
            rf"\mathbf{{{n}}}",
        ]
        same += [f"{n:,}".replace(",", mark) for mark in ("{,}", r"\,", r"\!,", " ", "\N{THIN SPACE}")]
        same += [
            f"**{n}**",
            f"`{n}`",
            f"x = {n}",
            f"{n - 3} + 3",
            rf"\frac{{{4 * n}}}{{4}}",
            rf"{n} \cdot 1",
            f"{2 * n}/2",
        ]
        near = [
            str(n + 1),
            str(n - 1),
            f"-{n}",
            f"{n}.5",
            f"{10 * n}",
            f"{n + 10:,}",
            rf"\frac{{1}}{{{n + 1}}}",
            f"**{n + 2}**",
        ]
        yield same, near


def huge_integers(rng: random.Random) -> Iterator[Family]:
    """Around the 4,300 digits that Python converts, and powers."""
    for length in (50, 4_299, 4_300, 4_301, 5_000, 20_000):
        digits = rng.choice("123456789") + "".join(rng.choices("0123456789", k=length - 2)) + "7"
        yield (
            [digits, f"00{digits}", f"+{digits}", f"{digits}.", f"${digits}$"],
            [digits[:-1] + "8", f"-{digits}", digits[1:], "7"],
        )
    for power in (99, 4_300, 9_000):
        digits = "1" + "0" * power
        yield (
            [digits, f"10^{{{power}}}", f"10^{power}", rf"1 \times 10^{{{power}}}"],
            [digits[:-1] + "1", f"10^{{{power + 1}}}"],
        )


def decimals(rng: random.Random) -> Iterator[Family]:
    for places in (1, 2, 3, 5, 8):
        n = rng.randrange(10**places, 20 * 10**places)
        text = f"{n // 10**places}.{n % 10**places:0{places}}"
        same = [
            text,
            f"{text}0",
            rf"\frac{{{n}}}{{{10**places}}}",
            f"{n}/{10**places}",
            f"{n}e-{places}",
            rf"{n} \cdot 10^{{-{places}}}",
        ]
        near = [f"{text}1", f"-{text}", text.replace(".", "0."), f"{n + 1}/{10**places}", str(n), f"{n}e-{places + 1}"]
        yield same, near
    yield ["0.25", ".25", "1/4"], [".255", "2.5", "0.025", "4"]
    yield [r"\frac{5}{11}", r"0.\overline{45}", r"0.\bar{45}"], ["0.45", r"0.4\overline{5}", r"\frac{5}{12}"]
    yield [r"\frac{1}{3}", r"0.\overline{3}", "1/3"], ["0.3", "0.33", "0.34", "3"]


def fractions(rng: random.Random) -> Iterator[Family]:
    for _ in range(6):
        bottom = rng.choice([3, 7, 9, 11, 13])
        top = rng.choice([n for n in range(2 * bottom + 1, 60) if n % bottom])
        whole, rest = divmod(top, bottom)
        same = [rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", rf"\dfrac{{{2 * top}}}{{{2 * bottom}}}"]
        same += [rf"{whole}\frac{{{rest}}}{{{bottom}}}", f"{whole} {rest}/{bottom}", rf"\tfrac{{{top}}}{{{bottom}}}"]
        same += [
            rf"-\frac{{{-top}}}{{{bottom}}}",
            rf"{top} \div {bottom}",
            rf"{{{top} \over {bottom}}}",
            rf"\frac{{-{top}}}{{-{bottom}}}",
        ]
        near = [
            rf"\frac{{{bottom}}}{{{top}}}",
            f"-{top}/{bottom}",
            rf"\frac{{{top + 1}}}{{{bottom}}}",
            f"{top}/{bottom + 1}",
        ]
        near += [
            rf"{whole + 1}\frac{{{rest}}}{{{bottom}}}",
            str(top),
            f"{whole}",
            f"{Fraction(top * 10**6 + 1, bottom * 10**6)}",
        ]
        yield same, near
    yield [r"\frac{1}{2}", r"\frac12", "0.5", "1/2"], [r"\frac13", "2", "-0.5", "0.05"]


def powers(rng: random.Random) -> Iterator[Family]:
    """Values so small that their differences round to zero, and so large that they have no float."""
    for base, n in ((2, 98), (2, 500), (3, 60), (7, 120)):
        same = [rf"\frac{{1}}{{{base}^{{{n}}}}}", f"{base}^{{-{n}}}", rf"\left(\frac{{1}}{{{base}}}\right)^{{{n}}}"]
        same += [f"1/{base}^{{{n}}}", f"1/{base}^{n}", rf"\frac{{{base}}}{{{base}^{{{n + 1}}}}}", f"1/{base**n}"]
        near = [
            f"1/{base}^{{{n + 1}}}",
            f"{base}^{{-{n - 1}}}",
            f"-{base}^{{-{n}}}",
            f"1/{base**n + 1}",
            "0",
            f"{base}^{{{n}}}",
        ]
        yield same, near
        same = [
            f"{base}^{{{n}}}",
            str(base**n),
            rf"{base} \cdot {base}^{{{n - 1}}}",
            f"{base}**{n}",
            rf"\sqrt{{{base}^{{{2 * n}}}}}",
        ]
        yield same, [str(base**n + 1), f"{base}^{{{n + 1}}}", f"{base + 1}^{{{n}}}", f"{base}^{{{n}}} - 1"]
    yield ["e^{-300}", r"\frac{1}{e^{300}}", r"\exp(-300)"], ["e^{-301}", "0", "e^{300}", r"\frac{2}{e^{300}}"]


def roots(rng: random.Random) -> Iterator[Family]:
    for n in ("2", "7", "15", "n", "x"):
        same = [rf"\frac{{1}}{{\sqrt{{{n}}}}}", rf"\sqrt{{\frac{{1}}{{{n}}}}}", rf"\frac{{\sqrt{{{n}}}}}{{{n}}}"]
        same += [
            rf"1/\sqrt{{{n}}}",
            f"{n}^{{-1/2}}",
            rf"\sqrt{{1/{n}}}",
            rf"\left(\frac{{1}}{{{n}}}\right)^{{\frac{{1}}{{2}}}}",
        ]
        yield (
            same,
            [rf"\sqrt{{{n}}}", rf"-\frac{{1}}{{\sqrt{{{n}}}}}", rf"\frac{{2}}{{\sqrt{{{n}}}}}", rf"\frac{{1}}{{{n}}}"],
        )
    for _ in range(5):
        a, b, n = rng.randint(2, 9), rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7, 11])
        same = [
            rf"{a}\sqrt{{{n}}}",
            rf"\sqrt{{{a * a * n}}}",
            f"{a}√{n}",
            f"{a}*sqrt({n})",
            rf"\frac{{{a * n}}}{{\sqrt{{{n}}}}}",
            f"{a} \\cdot {n}^{{0.5}}",
        ]
        yield (
            same,
            [rf"{a + 1}\sqrt{{{n}}}", rf"{a}\sqrt{{{n + 1}}}", rf"-{a}\sqrt{{{n}}}", rf"\sqrt{{{a * n}}}", str(a * n)],
        )
        same = [
            rf"{a} + {b}\sqrt{{{n}}}",
            rf"{b}\sqrt{{{n}}} + {a}",
            rf"\frac{{{a * a - b * b * n}}}{{{a} - {b}\sqrt{{{n}}}}}",
        ]
        yield same, [rf"{a} - {b}\sqrt{{{n}}}", rf"{b} + {a + b}\sqrt{{{n}}}", rf"{a + b}\sqrt{{{n}}}"]
    yield (
        [r"\sqrt[3]{16}", r"2\sqrt[3]{2}", "16^{1/3}", r"2 \cdot 2^{1/3}"],
        [r"\sqrt{16}", r"\sqrt[3]{2}", r"\sqrt[4]{16}", "16/3"],
    )
    yield (
        [r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}", r"\sqrt3+\sqrt2"],
        [r"\sqrt{5}", r"\sqrt{3}-\sqrt{2}", r"\sqrt{5-2\sqrt{6}}"],
    )


def constants_and_functions(rng: random.Random) -> Iterator[Family]:
    for top, bottom in ((3, 4), (5, 6), (7, 3), (2, 1)):
        same = [
            rf"\frac{{{top}\pi}}{{{bottom}}}",
            rf"\frac{{{top}}}{{{bottom}}}\pi",
            f"{top}π/{bottom}",
            f"{top}pi/{bottom}",
        ]
        yield (
            same,
            [
                rf"\frac{{{top}}}{{{bottom}}}",
                rf"-\frac{{{top}\pi}}{{{bottom}}}",
                rf"\frac{{{top}\pi}}{{{bottom + 1}}}",
                rf"{top * 22}/{bottom * 7}",
            ],
        )
    yield [r"3\ln 2", r"\ln 8", r"\ln(2^3)", r"-\ln\frac{1}{8}"], [r"\ln 6", r"\ln 9", r"\ln(2)+3", r"2\ln 3"]
    yield ["5", r"\log_2 32", r"\log_{2}(32)", r"\frac{\ln 32}{\ln 2}"], [r"\log_2 64", r"\log_{32} 2", r"\ln 32"]
    yield (
        [r"\frac{\sqrt{3}}{2}", r"\sin 60^\circ", r"\cos\frac{\pi}{6}", r"\sin\left(\frac{2\pi}{3}\right)"],
        [r"\cos 60^\circ", r"-\sin 60^\circ", r"\frac{\sqrt 3}{3}"],
    )
    yield (
        [r"\frac{\pi}{4}", r"\arctan 1", r"\tan^{-1}(1)", r"\arcsin\frac{\sqrt{2}}{2}"],
        [r"\arctan 2", r"\frac{\pi}{3}", "1"],
    )
    for n, k in ((7, 3), (10, 4)):
        same = [
            str(comb(n, k)),
            rf"\binom{{{n}}}{{{k}}}",
            rf"\frac{{{n}!}}{{{k}!{n - k}!}}",
            rf"\dbinom{{{n}}}{{{n - k}}}",
        ]
        yield same, [rf"\binom{{{n}}}{{{k - 1}}}", f"{n}!", str(comb(n, k) + 1), str(comb(n, k) - 10)]
        yield [str(factorial(n)), f"{n}!", rf"{n} \cdot {n - 1}!"], [f"{n - 1}!", str(factorial(n) + 1), str(n)]
    for a, b in ((3, 4), (-2, 5), (6, -7)):
        same = [
            f"{a}{b:+}i",
            f"{b}i{a:+}",
            rf"{a} + {b}\cdot i".replace("+ -", "- "),
            rf"\frac{{{a * a + b * b}}}{{{a}{-b:+}i}}",
        ]
        yield same, [f"{a}{-b:+}i", f"{b}{a:+}i", f"{-a}{b:+}i", str(a + b), f"{a}{b + 1:+}i"]


def percentages_and_money(rng: random.Random) -> Iterator[Family]:
    for n in (5, 12, 40, 75):
        yield (
            [rf"{n}\%", f"{n}%", f"0.{n:02}", f"{n} percent", rf"{n}\text{{ percent}}", f"{n}/100"],
            [f"{n + 1}%", f"{n / 10}%", f"{n}0%", f"0.00{n}"],
        )
    for n in (18, 250, 1320):
        same = [
            str(n),
            rf"\${n}",
            rf"\${n}.00",
            f"${n}",
            f"{n} dollars",
            rf"{n}\text{{ dollars}}",
            rf"\${n:,}",
            f"${n:,}.00",
        ]
        yield same, [rf"\${n + 1}", f"{n}.50", f"${n}0", f"{n} cents"[:0] + rf"\${n}.01", f"-{n}", f"{n - 1} dollars"]


def units(rng: random.Random) -> Iterator[Family]:
    rows = (
        (("cm", "centimeters"), ("mm", "m", "kg")),
        (("m/s", "meters per second"), ("km/h", "m")),
        (("kg", "kilograms"), ("g", "m")),
        (("hours", "hours"), ("minutes", "days")),
    )
    for (unit, name), others in rows:
        n = rng.randint(3, 90)
        same = [
            rf"{n}\text{{ {unit}}}",
            rf"{n} \text{{ {name}}}",
            f"{n} {unit}",
            str(n),
            rf"{n}\,\mathrm{{{unit}}}",
            f"{n} {name}",
            f"**{n} {unit}**",
        ]
        near = [rf"{n}\text{{ {other}}}" for other in others] + [
            f"{n + 1} {unit}",
            rf"{n * 10}\text{{ {unit}}}",
            str(n - 1),
        ]
        # A unit that is left out may be any: what is compared with another unit has one.
        yield same[:3], near
        yield [str(n), *same], [f"{n + 1} {unit}", str(n - 1)]
    yield [r"3\text{ m}", "300 cm", "0.003 km", "3 meters"], [r"3\text{ cm}", "30 cm", "3 km"]
    yield (
        [r"12\text{ cm}^2", "12 square centimeters", r"12\,\mathrm{cm}^2", "12 cm^2"],
        [r"12\text{ cm}^3", "13 cm^2", "12 cm"],
    )
    for n in (30, 72, 135):
        same = [rf"{n}^\circ", f"{n}°", str(n), rf"{n}^{{\circ}}", f"{n} degrees", rf"\angle ABC = {n}^\circ"]
        yield same, [rf"{n + 1}^\circ", rf"{180 - n}^\circ", f"{n / 10}", f"-{n}"]
    for n, thing in ((14, "apples"), (120, "ways"), (31, "students")):
        same = [
            str(n),
            f"{n} {thing}",
            rf"{n}\text{{ {thing}}}",
            f"There are {n} {thing}.",
            f"There are ${n}$ {thing} in total",
            f"{n}, since no two {thing} are equal",
        ]
        yield same, [f"{n + 1} {thing}", f"There are {n - 1} {thing}.", rf"{n * 2}\text{{ {thing}}}"]


def tuples_sets_and_lists(rng: random.Random) -> Iterator[Family]:
    for _ in range(4):
        a, b, c = rng.sample(range(-9, 20), 3)
        same = [f"({a}, {b}, {c})", f"({a},{b},{c})", rf"\left({a}, {b}, {c}\right)", rf"(x,y,z) = ({a},{b},{c})"]
        yield same, [f"({b}, {a}, {c})", f"({a}, {b})", f"({a}, {b}, {c + 1})", f"({c}, {b}, {a})"]
        same = [
            rf"\{{{a}, {b}, {c}\}}",
            rf"\left\{{{c}, {b}, {a}\right\}}",
            f"{b}, {a}, {c}",
            rf"x \in \{{{a},{c},{b}\}}",
        ]
        yield same, [rf"\{{{a}, {b}\}}", rf"\{{{a}, {b}, {c}, 50\}}", rf"\{{{a}, {b}, {c + 30}\}}", str(a)]
        same = [f"x = {a}, x = {b}", f"{a}, {b}", rf"x = {a} \text{{ or }} x = {b}", f"{b} and {a}", f"x={b} or x={a}"]
        yield same, [f"x = {a}", f"{a}, {b + 40}", f"x = {a + 40} or x = {b}", f"{a}, {b}, 60"]
        same = [f"x = {a}, y = {b}", f"y = {b}, x = {a}", f"x={a},y={b}"]
        yield same, [f"x = {b}, y = {a}", f"x = {a}, y = {b + 1}", f"x = {a}"]
        same = [
            rf"\begin{{pmatrix}} {a} & {b} \\ {c} & 1 \end{{pmatrix}}",
            rf"\begin{{bmatrix}}{a}&{b}\\{c}&1\end{{bmatrix}}",
        ]
        yield (
            same,
            [
                rf"\begin{{pmatrix}} {a} & {c} \\ {b} & 1 \end{{pmatrix}}",
                rf"\begin{{pmatrix}} {a} & {b} \\ {c} & 2 \end{{pmatrix}}",
                str(a),
            ],
        )
    yield (
        [r"1 \pm \sqrt{5}", r"1+\sqrt{5}, 1-\sqrt{5}", r"\{1-\sqrt 5, 1+\sqrt 5\}"],
        [r"1+\sqrt{5}", r"\pm\sqrt{5}", r"-1 \pm \sqrt{5}"],
    )


def intervals(rng: random.Random) -> Iterator[Family]:
    for a in (-7, 0, 4):
        b = a + rng.randint(1, 9)
        yield (
            [f"[{a}, {b})", rf"\left[{a}, {b}\right)", rf"{a} \le x < {b}", rf"x \in [{a},{b})", rf"{b} > x \geq {a}"],
            [f"[{a}, {b}]", f"({a}, {b})", f"({a}, {b}]", f"[{a}, {b + 1})", rf"{a} < x < {b}"],
        )
        yield (
            [rf"({a}, \infty)", f"x > {a}", f"({a}, ∞)", rf"{a} < x", rf"({a}, +\infty)"],
            [rf"[{a}, \infty)", f"x < {a}", rf"x \ge {a}", rf"(-\infty, {a})", f"x > {a + 1}"],
        )
        same = [
            rf"(-\infty, {a}] \cup ({b}, \infty)",
            rf"({b}, \infty) \cup (-\infty, {a}]",
            rf"x \le {a} \text{{ or }} x > {b}",
        ]
        yield (
            same,
            [
                rf"(-\infty, {a}) \cup ({b}, \infty)",
                rf"(-\infty, {a}]",
                rf"({a}, {b}]",
                rf"(-\infty, {a}] \cup [{b}, \infty)",
            ],
        )


def algebra(rng: random.Random) -> Iterator[Family]:
    for _ in range(8):
        a, b, name = rng.randint(2, 9), rng.randint(2, 9), rng.choice(["x", "n", "t", r"\theta"])
        same = [
            f"{name}^2 + {a + b}{name} + {a * b}",
            f"({name}+{a})({name}+{b})",
            f"({b} + {name})({a} + {name})",
            rf"{a * b} + {name}^{{2}} + {a + b}{name}",
        ]
        near = [
            f"({name}-{a})({name}+{b})",
            f"{name}^2 + {a + b}{name} - {a * b}",
            f"{name}^2 + {a * b}",
            f"(z+{a})(z+{b})",
        ]
        yield same, [*near, f"{name}^2 + {a + b + 1}{name} + {a * b}", str(a * b)]
        same = [f"y = {a}x + {b}", f"{a}x - y + {b} = 0", f"y - {b} = {a}x", f"{2 * a}x - 2y = -{2 * b}"]
        yield same, [f"y = {a}x - {b}", f"y = -{a}x + {b}", f"{a}x + y + {b} = 0", f"y = {a + 1}x + {b}", f"y = {a}x"]
        yield [f"x = {a}", str(a), f"x={a}.0", f"x = {2 * a}/2 = {a}"], [f"x = -{a}", f"x = {a + 1}", f"x^2 = {a}"]
    for same, near in (
        (
            (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}", r"\frac12 n(n+1)", "n(n+1)/2", r"\binom{n+1}{2}"),
            (r"\frac{n(n-1)}{2}", "n(n+1)", r"\frac{n^2+1}{2}"),
        ),
        (("2^{n+1}", r"2 \cdot 2^n", r"\frac{4^{n+1}}{2^{n+1}}"), ("2^n+1", "2^{n-1}", "2^{2n}", "(n+1)^2")),
        ((r"\pi(R^2-r^2)", r"\pi(R+r)(R-r)", r"\pi R^2-\pi r^2"), (r"\pi(r^2-R^2)", r"\pi(R-r)^2", r"\pi(R^2+r^2)")),
        (
            (r"\frac{1}{a}+\frac{1}{b}", r"\frac{a+b}{ab}", "a^{-1}+b^{-1}"),
            (r"\frac{1}{a+b}", r"\frac{2}{a+b}", r"\frac{ab}{a+b}"),
        ),
        (
            (r"\sin 2x", r"2\sin x\cos x", r"\sin(2x)", r"2\sin(x)\cos(x)"),
            (r"\cos 2x", r"2\sin x", r"\sin^2 x", r"\sin x \cos x"),
        ),
        (
            ("1", r"\sin^2\theta+\cos^2\theta", r"\sec^2 x-\tan^2 x"),
            (r"\sin^2\theta-\cos^2\theta", r"\sin\theta+\cos\theta", "0"),
        ),
        (("(-1)^n", r"(-1)^{n+2}", r"\frac{1}{(-1)^n}"), ("(-1)^{n+1}", "-1^n", "1")),
        (("|x|", r"\sqrt{x^2}", r"\left|x\right|", r"\lvert -x \rvert"), ("x", "-x", "x^2")),
        ((r"\frac{V_1}{V_2}", "V_1/V_{2}", "V_{1}V_{2}^{-1}"), (r"\frac{V_2}{V_1}", "V_1V_2", "V_1-V_2")),
        ((r"e^{x}e^{y}", "e^{x+y}", r"\exp(x+y)"), ("e^{xy}", "e^x+e^y", "e^{x-y}")),
        (("x^2+y^2=25", "y^2+x^2-25=0", r"\frac{x^2}{25}+\frac{y^2}{25}=1"), ("x^2+y^2=5", "x^2-y^2=25", "x+y=5")),
    ):
        yield list(same), list(near)


_SAYINGS = r"""
%s | (%s) | \text{%s} | %s. | %s) | [%s] | **%s** | *%s* | **(%s)** | `%s` | $%s$ | \textrm{%s} | \textbf{(%s)}
\mathrm{%s} | \mathbf{%s} | \boxed{%s} | \text{Option %s} | Option %s | option (%s) | Choice %s
Answer: **%s** | The correct answer is (%s) | The correct answer is **%s**. | the right choice is %s
The best option is %s. | I pick %s. | It must be (%s). | %s. 5 A | (%s) a neutral pion
%s) because the spin is 0 | %s, as charge is conserved | %s: 12 m | %s is correct. | Only option (%s) fits.
A neutral pion decays into two photons, so %s. | A photon has no mass; therefore %s | I think that it is %s.
Since I = 2 A, the answer is %s | It is not H, so it is %s | H is wrong, hence %s | Thus $\Rightarrow$ %s
A current of 5 A, so the answer is (%s).
"""


def choices(rng: random.Random) -> Iterator[Family]:
    for saying in _SAYINGS.strip().replace("\n", " | ").split(" | "):
        letter, *others = rng.sample("ABCDEFG" if "H" in saying else "ABCDEFGJ", 3)
        yield (
            [letter, f"({letter})", rf"\text{{{letter}}}", saying.replace("%s", letter)],
            [saying.replace("%s", other) for other in others],
        )
    yield (
        ["B", "(B)", "B", "(b)", "b", "option b", r"\text{b}"],
        ["(c)", "c", "12 m", "neither", "a neutral pion", "I do not know"],
    )


def words(rng: random.Random) -> Iterator[Family]:
    for group in (
        ("even", "odd"),
        ("yes", "no"),
        ("Monday", "Tuesday"),
        ("Evelyn", "Briana"),
        ("listen", "silent"),
        ("increasing", "decreasing"),
        ("hyperbola", "parabola"),
    ):
        for word in group:
            other = next(name for name in group if name != word)
            same = [
                word,
                rf"\text{{{word}}}",
                word,
                rf"\textbf{{{word}}}",
                word.upper(),
                f"{word}.",
                rf"\mathrm{{{word}}}",
                f'"{word}"',
            ]
            yield same, [other, rf"\text{{{other}}}", "7"]
    for word in ("undefined", "cannot be determined"):
        yield ["7", "7.0"], [word, rf"\text{{{word}}}"]


def times_and_ratios(rng: random.Random) -> Iterator[Family]:
    yield (
        ["12:00", "12:00", "$12:00$", r"\text{12:00}", "12:00 PM", "**12:00**", "12:00 noon"],
        ["12:01", "11:00", "1:00", "1:30 PM"],
    )
    for hour, minute in ((3, 5), (9, 30), (11, 45)):
        text, evening = f"{hour}:{minute:02}", f"{hour + 12}:{minute:02}"
        same = [f"{text} PM", rf"{text}\text{{ PM}}", evening, f"{text} p.m.", f"{text}pm", rf"\text{{{text} PM}}"]
        yield (
            same,
            [f"{text} AM", f"{hour}:{minute + 1:02} PM", f"{hour + 1}:{minute:02} PM", f"{hour + 13}:{minute:02}"],
        )
    for a, b in ((3, 4), (2, 9), (7, 5)):
        yield (
            [f"{a}:{b}", rf"\frac{{{a}}}{{{b}}}", f"{a} : {b}", f"{a}/{b}", f"{a} to {b}", f"{3 * a}:{3 * b}"],
            [f"{b}:{a}", f"{a}:{b + 1}", f"{a + b}"],
        )
    yield ["2:3:4", "2 : 3 : 4", "4:6:8"], ["4:3:2", "2:3:5", "2:3"]
    yield ["2516_8", "2516_{8}", "(2516)_8"], ["2517_8", "2516_9", "2516_{7}"]
    yield ["1101_2", "1101_{2}", "(1101)_{2}"], ["1011_2", "1101_3", "11011_2"]


def texts_with_several_answers(rng: random.Random) -> Iterator[Family]:
    """Which of them counts."""
    n = 482
    same = [
        str(n),
        str(n),
        str(n),
        f"\\boxed{{9}} and later \\boxed{{{n}}}\n",
        f"Answer: 9\nSo \\boxed{{{n}}}.\n",
        f"Answer: 9\nAnswer: {n}\n",
    ]
    same += [
        f"\\boxed{{9}}<|im_start|>answer\nAnswer: {n}",
        f"The answer is 9? No.\nThe answer is {n}.\n",
        f"Answer:\n\\[\n{n}\n\\]",
        f"We add.\n\n**{n}**\n",
    ]
    near = [
        f"\\boxed{{{n}}} and later \\boxed{{9}}\n",
        f"Answer: {n}\nAnswer: 9\n",
        f"\\boxed{{{n}}}<|im_start|>answer\nAnswer: 9",
    ]
    near += [
        f"It could be {n}, I have to\nthink about this once more",
        "\n",
        f"\\boxed{{{n}}}<|im_start|>answer\n",
        f"Answer: {n}\nAnswer: 9, not {n}\n",
    ]
    yield same, near
    yield (
        ["3, 4", "3, 4", "3, 4", "x is \\boxed{3} or \\boxed{4}\n"],
        ["\\boxed{3}\n", "\\boxed{3} and then \\boxed{4}\n"],
    )


KINDS: tuple[Callable[[random.Random], Iterator[Family]], ...] = (
    *(
        integers,
        huge_integers,
        decimals,
        fractions,
        powers,
        roots,
        constants_and_functions,
        percentages_and_money,
        units,
    ),
    *(tuples_sets_and_lists, intervals, algebra, choices, words, times_and_ratios, texts_with_several_answers),
)
