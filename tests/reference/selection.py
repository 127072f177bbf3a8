"""Selection in the plainest way: the exact probability of every order in which questions can be selected."""

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction

Pools = Mapping[str, list[tuple[str, int]]]
"""domain -> (question, length of its trace)"""


def orders(
    pools: Pools,
    size: int,
    *,
    preselected: tuple[str, ...] = (),
    stay: bool = False,
    uniform_until: int = 10**9,
    weights: Mapping[str, Fraction] | None = None,
) -> dict[tuple[str, ...], Fraction]:
    """Each tuple of `size` different questions, preselected ones first, with the probability of just this one."""
    left = {d: [q for q in pool if stay or q[0] not in preselected] for d, pool in pools.items()}
    probabilities: dict[tuple[str, ...], Fraction] = defaultdict(Fraction)

    def draw(chosen: tuple[str, ...], left: Pools, probability: Fraction) -> None:
        if len(chosen) == size:
            probabilities[chosen] += probability
            return
        domains = [domain for domain in left if left[domain]]
        share = {domain: Fraction(1) for domain in domains}
        if len(chosen) >= uniform_until and weights and any(weights.get(domain) for domain in domains):
            share = {domain: weights.get(domain, Fraction(0)) for domain in domains}
        for domain in domains:
            pool = left[domain]
            rank = {name: sum(other > length for _, other in pool) for name, length in pool}
            total = sum(Fraction(1, 2 ** rank[name]) for name, _ in pool)
            for question in pool:
                name = question[0]
                of_question = share[domain] / sum(share.values()) * Fraction(1, 2 ** rank[name]) / total
                if of_question:
                    rest = {**left, domain: [other for other in pool if other != question]}
                    then = chosen if name in chosen else (*chosen, name)
                    draw(then, rest, probability * of_question)

    draw(preselected, left, Fraction(1))
    return dict(probabilities)
