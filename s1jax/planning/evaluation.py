"""python decode.py evaluate CONFIG --plan TARGET: hours of a whole evaluation, from the compiled decode loop.

The engine's scheduling is gone through chunk by chunk, without a model: which rows are at work, and how many tokens
they hold, of which a step's time follows.
"""

import json
import random
import re
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from operator import eq

from s1jax.config import LOG_NORMAL, EvaluateConfig, EvaluatePlanSection, GenerateConfig
from s1jax.decoding.engine import STEPS_PER_CHUNK
from s1jax.decoding.pages import bucket
from s1jax.decoding.workload import SIGMA, lengths_of
from s1jax.device_memory import GIB
from s1jax.evaluation.runs import Run, plan_runs
from s1jax.evaluation.tasks import count_questions
from s1jax.jsonl import read_jsonl
from s1jax.model.flops import matmul_parameters
from s1jax.model.paged_attention import PAGE, num_pages
from s1jax.paths import any_path, write_whole
from s1jax.planning.cli import DOES_NOT_FIT
from s1jax.planning.generation import GenerationPlan, plan_generation
from s1jax.planning.hardware import PlanError, Target, parse_target
from s1jax.planning.lengths import log_normal
from s1jax.planning.report import device_hours
from s1jax.planning.training import resolve_architecture

_MARGIN = 2 * GIB
"""Of a device's memory, for what a step computes, where nobody says how large the cache is."""

Group = list[tuple[int, int]]
"""What follows each other in a row: tokens that are there before, and tokens that are decoded."""


@dataclass(frozen=True)
class Simulation:
    """All chunks of an evaluation."""

    seconds: float
    steps: int
    decoded_tokens: int
    mean_rows: float
    """At work, over the steps."""
    mean_live_tokens: float
    """In the contexts of all rows, over the steps."""
    most_pages: int
    put_back: int
    """How often a row had to wait again because pages ran out."""


def plan(config: EvaluateConfig) -> int:
    """Print the plan that the configuration asks for and write `plan.output`; returns the exit status.

    The status is 0 if the weights and one row fit, 3 if they do not. Raises ValueError or a subclass with what to
    change.
    """
    assert config.plan.target is not None
    if config.plan.search:
        raise PlanError("plan.search: ranks meshes for decode.py generate; take the best for mesh here")
    target = parse_target(config.plan.target)
    architecture = resolve_architecture(config.model.path)
    context = architecture.max_position_embeddings
    groups, held, source = _groups(config, min(config.max_total_tokens or context, context))
    longest = bucket(max(before + own for group in groups for before, own in group), context)
    step = _plan_step(config, target, longest)
    prefill = 2 * matmul_parameters(architecture) / config.plan.efficiency / target.hardware.peak_flops
    prefill /= target.num_devices // step.copies
    if step.pool_tokens < longest:
        print(f"{target}: a row of {longest} tokens does not fit")
        return DOES_NOT_FIT
    share = -(-len(groups) // step.copies)
    """Of the questions, the most that one copy of the model has."""

    def live(contexts: Sequence[int]) -> float:
        return sum(contexts)

    def padded(contexts: Sequence[int]) -> float:
        return step.rows * bucket(max(contexts), context)

    ours, theirs = (
        simulate(groups[:share], step.rows, pages, seconds_by(step, count), prefill)
        for count, pages in ((live, step.pool_tokens // PAGE), (padded, step.rows * num_pages(longest)))
    )
    print(_describe(config.plan, target, step, ours, theirs, held, source))
    if config.plan.output:
        content = {"step": asdict(step), "evaluation": asdict(ours), "padded": asdict(theirs), "held_tokens": held}
        write_whole(any_path(config.plan.output), json.dumps(content, indent=2) + "\n")
    return 0


def _plan_step(config: EvaluateConfig, target: Target, longest: int) -> GenerationPlan:
    """The decode loop with a cache for all rows at their longest, or for what there is room for."""
    asked = GenerateConfig(
        model=config.model,
        prompt="?",
        budget=config.budget,
        max_total_tokens=longest,
        sampling=config.sampling,
        batch_size=config.batch_size,
        cache=config.cache,
        mesh=config.mesh,
        plan=config.plan,
    )
    if config.cache.tokens is not None:
        return plan_generation(asked, target, target.devices())
    # A small cache first, for what weights and a step's arithmetic leave.
    small = plan_generation(replace(asked, cache=replace(config.cache, tokens=longest)), target, target.devices())
    memory = small.memory
    room = small.usable_bytes - _MARGIN - memory.parameters
    fitting = int(room / (memory.batch / small.pool_tokens))
    tokens = min(fitting, small.rows * longest)
    if tokens <= longest:
        return small
    return plan_generation(replace(asked, cache=replace(config.cache, tokens=tokens)), target, target.devices())


def seconds_by(step: GenerationPlan, live: Callable[[Sequence[int]], float]) -> Callable[[Sequence[int]], float]:
    """Seconds of one step by the contexts of the rows at work: planned with a full cache, it reads what is live."""
    estimate, cache = step.estimate, step.memory.batch / step.bytes_per_step * step.estimate.memory

    def seconds(contexts: Sequence[int]) -> float:
        read = estimate.memory - cache * (1 - live(contexts) / step.pool_tokens)
        return max(estimate.compute, read) + estimate.exposed + estimate.latency

    return seconds


def simulate(
    groups: Sequence[Group],
    rows: int,
    pages: int,
    seconds_of_step: Callable[[Sequence[int]], float],
    seconds_of_prefill: float,
) -> Simulation:
    """Go through the engine's chunks: rows are given groups in their order while there are pages, youngest last.

    Args:
        groups: what rows have to do, each at least one token.
        rows: that there are.
        pages: of all rows together, enough for the longest.
        seconds_of_step: by the contexts of the rows at work.
        seconds_of_prefill: of one token.
    """
    waiting = deque(_Row(list(group)) for group in groups)
    at_work: list[_Row] = []
    """The oldest first."""
    seconds, steps, decoded, put_back, most = 0.0, 0, 0, 0, 0
    rows_of_steps = live_of_steps = 0
    while waiting or at_work:
        while waiting and len(at_work) < rows and _held(at_work) + waiting[0].needed + len(at_work) <= pages:
            row = waiting.popleft()
            row.held = row.needed
            seconds += row.group[0][0] * seconds_of_prefill
            at_work.append(row)
        for row in list(at_work):
            row.held = max(row.held, row.needed)
            while _held(at_work) > pages:
                waiting.appendleft(at_work.pop())
                put_back += 1
        contexts = [row.group[0][0] + min(STEPS_PER_CHUNK, row.group[0][1]) // 2 for row in at_work]
        seconds += STEPS_PER_CHUNK * seconds_of_step(contexts)
        steps += STEPS_PER_CHUNK
        most = max(most, _held(at_work))
        rows_of_steps += STEPS_PER_CHUNK * len(contexts)
        live_of_steps += STEPS_PER_CHUNK * sum(contexts)
        decoded += sum(row.take_chunk() for row in at_work)
        at_work = [row for row in at_work if row.group]
    return Simulation(seconds, steps, decoded, rows_of_steps / steps, live_of_steps / steps, most, put_back)


@dataclass
class _Row:
    """What a row has to do, and the pages that it has."""

    group: Group
    held: int = 0

    @property
    def needed(self) -> int:
        """Pages for its next chunk."""
        context, left = self.group[0]
        return num_pages(context + min(STEPS_PER_CHUNK, left))

    def take_chunk(self) -> int:
        """Decode; returns how many tokens."""
        context, left = self.group[0]
        taken = min(STEPS_PER_CHUNK, left)
        self.group[0] = (context + taken, left - taken)
        if taken == left:
            del self.group[0]
            self.held = num_pages(self.group[0][0]) if self.group else 0
        return taken


def _held(rows: Sequence[_Row]) -> int:
    return sum(row.held for row in rows)


def _groups(config: EvaluateConfig, limit: int) -> tuple[list[Group], int, str]:
    """What rows have to do for all questions; the tokens of all runs' outputs; and in words where that is from."""
    section, samples = config.plan, config.sampling.num_samples
    if not section.lengths.startswith("lognormal:"):
        return _measured(section.lengths, share=config.sweep.share)
    count = section.questions or count_questions(config.tasks, config.limit)
    if not re.fullmatch(LOG_NORMAL, section.lengths):
        raise PlanError(f"plan.lengths: {section.lengths} is not lognormal:MEAN:MAX")
    mean, longest = lengths_of(section.lengths)
    longest = min(longest, limit - section.prompt_length)
    if not 2 <= mean <= longest:
        raise PlanError(f"plan.lengths: the mean ({mean}) must be from 2 to the longest output ({longest})")
    lengths = log_normal(count * samples, mean, longest, SIGMA).tolist()
    random.Random(0).shuffle(lengths)
    runs = list({run.name: run for method in plan_runs(config).values() for run in method}.values())
    groups, held = [], 0
    for length in lengths:
        outputs = [_output_of(run, runs, length, section.answer_tokens) for run in runs]
        held += sum(shared + own for shared, own in outputs)
        trunk = max(shared + own for shared, own in outputs)
        if config.sweep.share:
            forks = [(shared, own) for shared, own in outputs if 0 < shared + own < trunk]
            groups.append([(section.prompt_length, trunk)])
            groups[-1] += [(section.prompt_length + shared, own) for shared, own in sorted(forks, reverse=True)]
        else:
            groups += [[(section.prompt_length, shared + own)] for shared, own in outputs]
    text = f"{count} questions x {samples} samples x {len(runs)} runs; the longest run's outputs {section.lengths}"
    return groups, held, f"assumed: {text}, prompts of {section.prompt_length}, answers of {section.answer_tokens}"


def _output_of(run: Run, runs: Sequence[Run], length: int, answer: int) -> tuple[int, int]:
    """Tokens that a run has in common with the longest of this length, and those that are its own."""
    thinking = max(0, length - answer)
    most_waits = max(other.budget.num_ignore for other in runs)
    # Each further wait has the model think for as long as it did before its first one.
    natural = thinking * (1 + run.budget.num_ignore) // (1 + most_waits)
    limit = run.budget.max_thinking_tokens
    return min(natural, limit) if isinstance(limit, int) else natural, min(answer, length)


def _measured(path: str, *, share: bool) -> tuple[list[Group], int, str]:
    """As an earlier evaluation's samples.jsonl has them. Raises InputError for a file that is none."""
    source = read_jsonl(any_path(path))
    if source.problems:
        raise source.error(source.problems)
    lines = defaultdict(list)
    for _, row in source.rows:
        if not {"task", "id", "sample", "prompt_ids", "output_ids"} <= row.keys():
            raise PlanError(f"plan.lengths: {path} is not the samples.jsonl of an evaluation")
        lines[row["task"], str(row["id"]), row["sample"]].append((len(row["prompt_ids"]), row["output_ids"]))
    groups: list[Group] = []
    for outputs in lines.values():
        prompt, trunk = max(outputs, key=lambda item: len(item[1]))
        group = [(prompt, len(trunk))]
        for before, output in outputs if share else ():
            common = sum(1 for _ in takewhile(bool, map(eq, output, trunk)))
            group += [(before + common, len(output) - common)] if common < len(output) else []
        groups += [group] if share else [[(before, len(output))] for before, output in outputs if output]
    held = sum(len(output) for outputs in lines.values() for _, output in outputs)
    if not any(own for group in groups for _, own in group):
        raise PlanError(f"plan.lengths: {path} has no outputs")
    return groups, held, f"measured: {path}"


def _describe(
    section: EvaluatePlanSection,
    target: Target,
    step: GenerationPlan,
    ours: Simulation,
    padded: Simulation,
    held: int,
    source: str,
) -> str:
    copies = f", in each of {step.copies} copies" if step.copies > 1 else ""
    return "\n".join(
        [
            f"{target}: {step.rows} rows, {step.pool_tokens:,} tokens of cache{copies}; "
            f"weights {step.memory.parameters / GIB:.1f} + cache {step.memory.batch / GIB:.1f} of "
            f"{step.usable_bytes / GIB:.1f} GiB",
            f"{ours.seconds / 3600:.2f} hours, {device_hours(ours.seconds, section, target)}: {ours.steps:,} steps of "
            f"{1000 * ours.seconds / ours.steps:.2f} ms, {ours.decoded_tokens / ours.seconds:,.0f} tokens/s",
            f"decoded {ours.decoded_tokens:,} tokens, of {held:,} that all runs hold"
            + (", by one copy" if step.copies > 1 else ""),
            f"on average {ours.mean_rows:.1f} rows at work with {ours.mean_live_tokens:,.0f} tokens; at most "
            f"{ours.most_pages * PAGE:,} in pages; {ours.put_back} times a row waited again",
            f"if each row were charged for the longest one: {padded.seconds / 3600:.2f} hours, "
            f"{padded.seconds / ours.seconds:.2f} times as long",
            source,
            f"assumed: prefill at {section.efficiency:.0%} of the peak; not counted: start, compilation, grading",
        ]
    )
