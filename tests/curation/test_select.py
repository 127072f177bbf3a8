"""Selection against exact probabilities. Every chi-square test is also made with a rule that is not the right one."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from s1jax.curation.config import PreselectionSection, SelectSection
from s1jax.curation.select import Candidate, choose, preselect
from tests.curation.stages import Row, card, filtered, read_rows, run_stage, write_rows
from tests.reference.selection import Pools, orders

POOLS: Pools = {"algebra": [("a9", 9), ("a7", 7), ("a5", 5)], "botany": [("b8", 8), ("b2", 2)], "chess": [("c4", 4)]}
WEIGHTS = {"algebra": Fraction(1, 2), "botany": Fraction(1, 8), "other": Fraction(3)}
SIGNIFICANT = 1e-3
RUNS = 2000


def candidates(pools: Pools) -> list[Candidate]:
    return [
        Candidate(name, "s", domain, length, "right")
        for domain, pool in pools.items()
        for name, length in reversed(pool)
    ]


def p_value(counts: Mapping[Any, int], probabilities: Mapping[Any, Fraction | float]) -> float:
    """Of a chi-square test; outcomes expected less than 5 times count as one. 0 if an impossible one occurred."""
    if set(counts) - {outcome for outcome, probability in probabilities.items() if probability}:
        return 0.0
    total = sum(counts.values())
    expected = {outcome: float(probability) * total for outcome, probability in probabilities.items()}
    often = [outcome for outcome in expected if expected[outcome] >= 5]
    observed = [counts.get(outcome, 0) for outcome in often]
    wanted = [expected[outcome] for outcome in often]
    rest = total - sum(wanted)
    if rest > 1e-6:
        observed.append(total - sum(observed))
        wanted.append(rest)
    return float(chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, {"uniform_until": 0, "weights": WEIGHTS}),
        ({"uniform_until": 2, "weights": WEIGHTS}, {"uniform_until": 1, "weights": WEIGHTS}),
        ({"uniform_until": 1, "weights": WEIGHTS, "preselected": ("a7",)}, {"preselected": ("a7",)}),
        ({"preselected": ("a9",), "stay": True}, {"preselected": ("a9",), "stay": False}),
        ({"preselected": ("a9",), "stay": False}, {"preselected": ("a9",), "stay": True}),
    ],
)
def test_orders_have_their_exact_probabilities(changes: dict[str, Any], wrong: dict[str, Any]) -> None:
    pool = candidates(POOLS)
    chosen_before = [candidate for candidate in pool if candidate.id in changes.get("preselected", ())]
    weights = {domain: float(weight) for domain, weight in changes.get("weights", {}).items()}
    counts: Counter[tuple[str, ...]] = Counter()
    for seed in range(RUNS):
        section = SelectSection(
            size=3,
            seed=seed,
            preselected_stay=changes.get("stay", False),
            uniform_until=changes.get("uniform_until", 700),
        )
        counts[tuple(c.id for c in choose(pool, chosen_before, section, weights))] += 1
    assert p_value(counts, orders(POOLS, 3, **changes)) > SIGNIFICANT
    assert p_value(counts, orders(POOLS, 3, **wrong)) < 1e-6


def synthetic_pool(directory: Path, domains: int = 10, of_each: int = 500) -> None:
    """Domains of different sizes, lengths in no order."""
    rng = np.random.default_rng(0)
    rows = []
    for domain in range(domains):
        count = of_each + 40 * domain
        for number, words in enumerate(rng.permutation(count).tolist()):
            rows.append(filtered(f"{domain}-{number}", words + 1, domain=f"domain {domain}"))
    write_rows(directory / "filtered.jsonl", [rows[i] for i in rng.permutation(len(rows)).tolist()])


def ranks(pool: Sequence[Row], selected: Sequence[Row]) -> list[int]:
    """The rank that each selected row had among those of its domain still there, recounted."""
    left: dict[str, list[int]] = {}
    for row in pool:
        left.setdefault(row["domain"], []).append(len(row["trace"].split()))
    found = []
    for row in selected:
        lengths = left[row["domain"]]
        found.append(sum(length > row["trace_length"] for length in lengths))
        lengths.remove(row["trace_length"])
    return found


def geometric(base: float) -> dict[int, float]:
    weights = {rank: base**-rank for rank in range(400)}
    return {rank: weight / sum(weights.values()) for rank, weight in weights.items()}


def test_frequencies_by_domain_and_by_rank(tmp_path: Path) -> None:
    run = tmp_path / "run"
    synthetic_pool(run)
    benchmark = [f"domain {d}" for d, count in enumerate((5, 4, 3, 2, 1)) for _ in range(count)]
    other = ["domain 0", "domain 9"]
    sets = {
        name: {
            "path": str(write_rows(tmp_path / f"{name}.jsonl", [{"domain": domain} for domain in rows])),
            "weight": w,
        }
        for name, rows, w in (("aime", benchmark, 1.0), ("gpqa", other, 0.5))
    }
    config = {"select": {"size": 2000, "uniform_until": 1200, "benchmarks": sets, "seed": 1}}
    assert run_stage("select", run, config) == 0
    selected = read_rows(run / "selected.jsonl")
    assert len({row["id"] for row in selected}) == 2000
    uniform = {f"domain {domain}": 0.1 for domain in range(10)}
    shares = dict.fromkeys(uniform, 0.0)
    for rows, total in ((benchmark, 2 / 3), (other, 1 / 3)):
        for domain in rows:
            shares[domain] += total / len(rows)
    by_size = {f"domain {domain}": (500 + 40 * domain) / 6800 for domain in range(10)}
    early, late = (Counter(row["domain"] for row in part) for part in (selected[:1200], selected[1200:]))
    assert p_value(early, uniform) > SIGNIFICANT
    assert p_value(late, shares) > SIGNIFICANT
    assert p_value(early, by_size) < 1e-6
    assert p_value(late, uniform) < 1e-6
    by_rank = Counter(ranks(read_rows(run / "filtered.jsonl"), selected))
    assert p_value(by_rank, geometric(2)) > SIGNIFICANT
    assert p_value(by_rank, geometric(1.8)) < 1e-6
    assert p_value(by_rank, geometric(2.2)) < 1e-6


def test_a_seed_decides_all_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    run = tmp_path / "run"
    synthetic_pool(run, 3, 30)

    def selected(seed: int) -> bytes:
        assert run_stage("select", run, {"select": {"size": 50, "seed": seed}}) == 0
        return (run / "selected.jsonl").read_bytes()

    first = selected(5)
    write_rows(run / "filtered.jsonl", read_rows(run / "filtered.jsonl")[::-1])
    assert selected(5) == first
    assert selected(6) != first


def test_a_small_domain_that_is_used_up_leaves(tmp_path: Path) -> None:
    rows = [filtered(f"a{i}", i + 1, domain="a") for i in range(2)] + [
        filtered(f"b{i}", 1, domain="b") for i in range(9)
    ]
    write_rows(tmp_path / "run" / "filtered.jsonl", rows)
    assert run_stage("select", tmp_path / "run", {"select": {"size": 11}}) == 0
    assert {row["id"] for row in read_rows(tmp_path / "run" / "selected.jsonl")} == {row["id"] for row in rows}


def test_preselection_goes_by_source_verdict_and_length() -> None:
    pool = [
        Candidate(f"{source} {length} {teacher}", source, "d", length, teacher)
        for source in ("AIME", "MATH", "xword")
        for length in (5600, 5601)
        for teacher in ("right", "wrong", "ungraded")
    ]
    rules = {"AIME": PreselectionSection(), "MATH": PreselectionSection(trace_longer_than=5600)}
    found = [candidate.id for candidate in preselect(pool, SelectSection(preselect=rules))]
    assert found == ["AIME 5600 right", "AIME 5601 right", "MATH 5601 right"]
    rules = {"MATH": PreselectionSection(teacher_right=False, trace_longer_than=5600)}
    assert len(preselect(pool, SelectSection(preselect=rules))) == 3


def test_preselected_questions_come_first_and_are_counted(tmp_path: Path) -> None:
    rows = [filtered(f"q{i}", i + 1, teacher="right" if i < 3 else "wrong") for i in range(20)]
    write_rows(tmp_path / "run" / "filtered.jsonl", rows)
    assert run_stage("select", tmp_path / "run", {"select": {"size": 10, "preselect": {"s": {}}}}) == 0
    assert [row["id"] for row in read_rows(tmp_path / "run" / "selected.jsonl")[:3]] == ["q0", "q1", "q2"]
    table = card(tmp_path / "run")["select"]["tables"]["selected"]
    assert (table["preselected"], table["drawn"], table["answered right by the teacher"]) == (3, 7, 3)


def test_domains_come_from_a_column_or_from_the_stage_domains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_rows(run / "filtered.jsonl", [filtered("a", 1, domain="own"), filtered("b", 1), filtered("c", 1)])
    write_rows(run / "domains.jsonl", [{"id": "b", "domain": "asked"}, {"id": "c", "domain": None}])
    assert run_stage("select", run, {"select": {"size": 3}}) == 0
    found = {row["id"]: row["domain"] for row in read_rows(run / "selected.jsonl")}
    assert found == {"a": "own", "b": "asked", "c": "unclassified"}


def test_lengths_in_tokens(tmp_path: Path, tokenizer_directory: Path) -> None:
    write_rows(tmp_path / "run" / "filtered.jsonl", [filtered("a", 1, trace="unheardofword")])
    for tokenizer, many in ((None, False), (str(tokenizer_directory), True)):
        assert run_stage("select", tmp_path / "run", {"select": {"size": 1, "tokenizer": tokenizer}}) == 0
        (row,) = read_rows(tmp_path / "run" / "selected.jsonl")
        assert (row["trace_length"] > 1) == many


def _other_benchmark(directory: Path) -> Row:
    return {"benchmarks": {"b": {"path": str(write_rows(directory / "b.jsonl", [{"domain": "05"}]))}}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (lambda _: {"size": 6}, "5 questions are left, and select.size asks for 6"),
        (lambda _: {"size": 2, "preselect": {"s": {}}}, "3 are preselected, and select.size asks for 2"),
        (lambda _: {"size": 2, "preselect": {"S": {}}}, "select.preselect: no such source: S"),
        (lambda d: {"size": 2, **_other_benchmark(d)}, "none of their domains (05) is one of the questions' (field)"),
    ],
)
def test_what_cannot_be_selected_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: Callable[[Path], Row], message: str
) -> None:
    rows = [filtered(f"q{i}", 1, domain="field", teacher="right" if i < 3 else "wrong") for i in range(5)]
    write_rows(tmp_path / "run" / "filtered.jsonl", rows)
    assert run_stage("select", tmp_path / "run", {"select": {"size": 5}}) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert run_stage("select", tmp_path / "run", {"select": section(tmp_path)}) == 1
    assert message in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_stages_that_select_needs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("select", tmp_path / "run") == 1
    assert "run the stage filter first" in capsys.readouterr().err
    write_rows(tmp_path / "run" / "filtered.jsonl", [filtered("a", 1, teacher=None)])
    assert run_stage("select", tmp_path / "run", {"select": {"size": 1, "preselect": {"s": {}}}}) == 1
    assert "run the stages grade and filter" in capsys.readouterr().err
