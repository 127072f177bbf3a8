"""The stage select: s1's algorithm 1, questions drawn for difficulty and diversity."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from s1jax.config_reader import ConfigError
from s1jax.curation.card import Entry
from s1jax.curation.config import BenchmarkSection, CurateConfig, SelectSection
from s1jax.curation.files import stage_output
from s1jax.data.sources import read_source
from s1jax.jsonl import InputError, Problem, describe, replace_rows, stream_rows
from s1jax.paths import AnyPath
from s1jax.progress import progress
from s1jax.tokenizer import encode, load_tokenizer

UNCLASSIFIED = "unclassified"
"""The domain of questions for which none is known."""


class Candidate(NamedTuple):
    """What selection looks at."""

    id: str
    source: str
    domain: str
    length: int
    """Of the trace, in tokens or words."""
    teacher: str | None
    """Verdict of the teacher's answer: right, wrong or ungraded; None: not graded."""


def select(config: CurateConfig, output_dir: AnyPath) -> Entry:
    """Write selected.jsonl: of filtered.jsonl, the preselected questions by id, then the others as they were drawn.

    Raises ConfigError, and InputError if fewer questions are left than wanted, or files cannot be used.
    """
    section = config.select
    unknown = set(section.preselect) - set(config.sources)
    if unknown:
        raise ConfigError(f"select.preselect: no such source: {', '.join(sorted(unknown))}")
    filtered = stage_output(output_dir, "filtered.jsonl", "filter")
    weights = _domain_weights(section.benchmarks)
    candidates = _candidates(config, filtered)
    if weights and not any(weights.get(candidate.domain) for candidate in candidates):
        raise InputError(
            f"select.benchmarks: none of their domains ({_listed(weights)}) is one of the questions' "
            f"({_listed(candidate.domain for candidate in candidates)})"
        )
    preselected = preselect(candidates, section)
    chosen = choose(candidates, preselected, section, weights)
    place = {candidate.id: at for at, candidate in enumerate(chosen)}
    rows: list[dict[str, Any]] = [{} for _ in chosen]
    for row in stream_rows(filtered):
        if row["id"] in place:
            candidate = chosen[place[row["id"]]]
            rows[place[row["id"]]] = {**row, "domain": candidate.domain, "trace_length": candidate.length}
    replace_rows(output_dir / "selected.jsonl", rows)
    lengths = [candidate.length for candidate in chosen]
    unit = "tokens" if section.tokenizer else "words"
    return Entry(
        [("selected", len(chosen))],
        {
            "selected": {
                "preselected": len(preselected),
                "drawn": len(chosen) - len(preselected),
                "answered right by the teacher": sum(candidate.teacher == "right" for candidate in chosen),
                f"{unit} of a trace, mean": float(np.mean(lengths)),
                f"{unit} of a trace, longest": max(lengths),
            },
            "selected by domain": dict(Counter(candidate.domain for candidate in chosen).most_common()),
            "selected by source": dict(Counter(candidate.source for candidate in chosen).most_common()),
        },
    )


def _listed(domains: Iterable[str]) -> str:
    """The first few of these, each once."""
    different = list(dict.fromkeys(domains))
    return ", ".join(different[:5]) + ", ..." * (len(different) > 5)


def preselect(candidates: Sequence[Candidate], section: SelectSection) -> list[Candidate]:
    """The candidates that the rules of their sources select, by id. Raises InputError if answers were to be graded."""
    rules = section.preselect
    if any(rule.teacher_right for rule in rules.values()) and all(c.teacher is None for c in candidates):
        raise InputError(
            "select.preselect: whether the teacher was right is not known; run the stages grade and filter"
        )
    return sorted(
        candidate
        for candidate in candidates
        if (rule := rules.get(candidate.source))
        and candidate.length > rule.trace_longer_than
        and (candidate.teacher == "right" or not rule.teacher_right)
    )


def choose(
    candidates: Sequence[Candidate],
    preselected: Sequence[Candidate],
    section: SelectSection,
    weights: Mapping[str, float],
) -> list[Candidate]:
    """`section.size` candidates: the preselected ones, then draws of a domain and of a rank in it.

    A domain is drawn uniformly, from `uniform_until` selected on in proportion to its weight (uniformly again if none
    of those left has any). Its candidates are ranked by length, the longest first; rank r is drawn with weight 2^-r.
    The order of the candidates is of no account. Raises InputError if there are too few or too many preselected.
    """
    if len(candidates) < section.size:
        raise InputError(f"select: {len(candidates)} questions are left, and select.size asks for {section.size}")
    if len(preselected) > section.size:
        raise InputError(f"select: {len(preselected)} are preselected, and select.size asks for {section.size}")
    rng = np.random.default_rng(section.seed)
    selected = dict.fromkeys(preselected)
    pools: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: (-c.length, c.id)):
        if section.preselected_stay or candidate not in selected:
            pools.setdefault(candidate.domain, []).append(candidate)
    while len(selected) < section.size:
        domains = sorted(pools)
        shares = np.array([weights.get(domain, 0.0) for domain in domains])
        if len(selected) < section.uniform_until or not shares.any():
            shares = np.ones(len(domains))
        domain = domains[rng.choice(len(domains), p=shares / shares.sum())]
        selected.setdefault(pools[domain].pop(_draw_rank(len(pools[domain]), rng)))
        if not pools[domain]:
            del pools[domain]
    return list(selected)


def _draw_rank(count: int, rng: np.random.Generator) -> int:
    """A rank below `count`, with weight 2^-rank."""
    while (rank := int(rng.geometric(0.5)) - 1) >= count:
        pass
    return rank


def _candidates(config: CurateConfig, filtered: AnyPath) -> list[Candidate]:
    """One candidate for each line of filtered.jsonl, its domain from there or from the stage domains."""
    name = config.select.tokenizer
    tokenizer = load_tokenizer(name) if name else None
    classified = filtered.with_name("domains.jsonl")
    domains = (
        {row["id"]: row["domain"] for row in stream_rows(classified, id=str, domain=str | None)}
        if classified.exists()
        else {}
    )
    candidates = []
    rows = stream_rows(filtered, id=str, source=str, trace=str, domain=str | None, teacher=str | None)
    with progress("trace", None, name="select") as bar:
        for row in rows:
            trace = row["trace"]
            length = len(encode(trace, tokenizer)) if tokenizer else len(trace.split())
            domain = row["domain"] or domains.get(row["id"]) or UNCLASSIFIED
            candidates.append(Candidate(row["id"], row["source"], domain, length, row["teacher"]))
            bar.update()
    return candidates


def _domain_weights(benchmarks: Mapping[str, BenchmarkSection]) -> dict[str, float]:
    """The sum over benchmarks of each domain's share, times the benchmark's weight."""
    weights: dict[str, float] = defaultdict(float)
    for section in benchmarks.values():
        source = read_source(section.path, section.subset, section.split)
        problems = [
            *source.problems,
            *(
                Problem(number, f"{section.domain}: expected a text, found {describe(row.get(section.domain))}")
                for number, row in source.rows
                if not isinstance(row.get(section.domain), str)
            ),
        ]
        if problems:
            raise source.error(problems)
        for domain, count in Counter(row[section.domain] for _, row in source.rows).items():
            weights[domain] += section.weight * count / len(source.rows)
    return dict(weights)
