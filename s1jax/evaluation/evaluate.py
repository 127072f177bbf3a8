"""python decode.py evaluate: questions through every run, each answer graded and kept, then the summary and report."""

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from typing import Any

from s1jax.config import EvaluateConfig
from s1jax.config_reader import ConfigError
from s1jax.decoding.engine import Engine
from s1jax.decoding.hosts import SharedOutput, same_command, start_hosts
from s1jax.decoding.profiles import PreparedPrompt, prepare_prompt
from s1jax.decoding.requests import Request, encode_prompt
from s1jax.decoding.results import Finished
from s1jax.decoding.setup import build_engine, check_requests, prepare, say_rounding
from s1jax.evaluation.grading import Grader
from s1jax.evaluation.report import write_report
from s1jax.evaluation.runs import Run, plan_runs
from s1jax.evaluation.summary import Line, accepted, summarise
from s1jax.evaluation.tasks import Question, load_tasks
from s1jax.jsonl import InputError
from s1jax.model.fingerprint import model_fingerprint
from s1jax.paths import any_path, write_whole
from s1jax.processes import together
from s1jax.progress import progress
from s1jax.resume import keep_settings, settings_of

_FREE_TO_CHANGE = ("output_dir", "batch_size", "cache", "mesh", "grading_seconds", "plan")
"""Keys that a stopped evaluation may go on with other values of: the results do not depend on them, but for the
cache's dtype."""

_KEY = ("task", "run", "id", "sample")
_Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class _Job:
    """One answer to one question in one run."""

    run: Run
    question: Question
    request: Request


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """Run all that is not in `output_dir` yet, write samples.jsonl, summary.json and the report; return the summary.

    Of several processes one writes the summary, once all answers are there, and the others return None. Everything is
    checked before the weights are read. Raises ConfigError, InputError, ValueError, OSError, InUseError or
    OutOfMemoryError with a message for the person who started the run.
    """
    if "rejection" in config.sweep.baselines and config.sampling.temperature == 0:
        raise ConfigError("sweep.baselines: rejection draws again and again, so sampling.temperature must be above 0")
    if config.sweep.baselines and not any(limit != "auto" for limit in config.sweep.max_thinking_tokens):
        raise ConfigError("sweep.baselines: they keep to the numbers in sweep.max_thinking_tokens, and there are none")
    hosts = start_hosts(config.mesh)
    if hosts.writes:
        say_rounding(config.model.dtype, "model.dtype=float32")
    setup = together(lambda: prepare(config))
    questions = together(lambda: _questions(config))
    methods = plan_runs(config)
    runs = {run.name: run for of_method in methods.values() for run in of_method}.values()
    asked = list(product(runs, enumerate(questions)))

    @cache
    def prompt(index: int, instruction: str) -> PreparedPrompt:
        question = questions[index]
        try:
            encoded = encode_prompt(question.text + instruction, setup.tokenizer, config.chat_template)
        except ValueError as error:
            raise InputError(f"{question.task} {question.id}: {error}") from None
        return prepare_prompt(encoded.input_ids, setup.profile, encoded.after_user)

    def jobs(done: dict[_Key, Line], takes: Callable[[int], bool] = lambda index: True) -> list[_Job]:
        """What is to be generated next: all that is missing, of rejected samples one more try each.

        All that is asked of a question is one process's: a rejected sample calls for the next, and runs share tokens.
        """
        missing = []
        for run, (index, question) in asked:
            if takes(index):
                for sample in _missing_samples(config, run, question, done):
                    own = prompt(index, run.instruction)
                    request = Request(own, run.budget, index, sample, setup.sampling, config.sampling.seed)
                    missing.append(_Job(run, question, request))
        return missing

    named = [
        (f"{job.question.task} {job.question.id}, {job.run.name}", job.request)
        for job in jobs({})
        if job.request.sample == 0
    ]
    same_command(config, hosts, [job.request for job in jobs({})])
    check_requests(named, setup.profile, setup.context_length, config.cache.tokens)
    directory = any_path(config.output_dir)
    with SharedOutput(directory / "samples.jsonl", hosts) as output:

        def resume() -> list[Line]:
            """Of the lines that are there, what `jobs` needs; refuses those of other settings, models or questions."""
            settings = settings_of(config, _FREE_TO_CHANGE, model_fingerprint(config.model))
            settings["cache.dtype"] = config.cache.dtype
            settings["sweep"].pop("share")
            first = hosts.processes.index == 0
            keep_settings(settings, output.path, directory / "config.json", save=first)
            asked_for = {
                (question.task, run.name, question.id): _asked(run, question, prompt(index, run.instruction))
                for run, (index, question) in asked
            }
            rows = output.rows()
            for row in rows:
                expected = asked_for.get(_key(row)[:3])
                if expected is None or any(row.get(name) != value for name, value in expected.items()):
                    raise InputError(
                        f"{output.path}: it has {row['task']} {row['id']}, whose text or reference is not that one "
                        "here: move it away"
                    )
            return [{name: row[name] for name in (*_KEY, "thinking_end")} for row in rows]

        lines = {_key(row): row for row in hosts.told(resume)}
        engine: Engine | None = None
        with _Graded(output, config.grading_seconds) if hosts.writes else nullcontext() as graded:
            decoded = held = 0
            while missing := jobs(lines, hosts.deals):
                if engine is None:
                    build = partial(build_engine, config, setup, len(missing), share=config.sweep.share)
                    engine = together(build)
                job_of = {id(job.request): job for job in missing}
                with progress("answer", len(missing), shown=hosts.writes) as bar:
                    for event in engine.run([job.request for job in missing]):
                        if isinstance(event, Finished):
                            line = _line(job_of[id(event.request)], event)
                            lines[_key(line)] = line
                            decoded, held = decoded + event.num_decoded_tokens, held + len(line["output_ids"])
                            if graded:
                                graded.add(line)
                            bar.set_postfix_str(f"decoded {decoded:,} of {held:,} tokens", refresh=False)
                        bar.update(isinstance(event, Finished))
        place = {(question.task, run.name, question.id): n for n, (run, (_, question)) in enumerate(asked)}
        with output.merged(
            lambda rows: len(jobs({_key(row): row for row in rows})),
            _key,
            order=lambda row: (place[_key(row)[:3]], row["sample"]),
        ) as last:
            if not last:
                return None
            rows = output.rows()
            summary = summarise(config, questions, methods, rows) | {"decoded": {"tokens": decoded, "of": held}}
            write_whole(directory / "summary.json", json.dumps(summary, indent=2) + "\n")
            write_report(directory, summary, rows, setup.tokenizer, setup.profile)
            return summary


def _questions(config: EvaluateConfig) -> list[Question]:
    return load_tasks(config.tasks, seed=config.sampling.seed, limit=config.limit)


def _key(row: Line) -> _Key:
    return row["task"], row["run"], row["id"], row["sample"]


def _missing_samples(config: EvaluateConfig, run: Run, question: Question, done: dict[_Key, Line]) -> list[int]:
    def line(sample: int) -> Line | None:
        return done.get((question.task, run.name, question.id, sample))

    if not run.rejection:
        return [sample for sample in range(config.sampling.num_samples) if line(sample) is None]
    for sample in range(config.sweep.max_tries):
        tried = line(sample)
        if tried is None:
            return [sample]
        if accepted(tried):
            return []
    return []


def _asked(run: Run, question: Question, prompt: PreparedPrompt) -> Line:
    """What a line answers, and what it is graded by."""
    return {
        "question": question.text + run.instruction,
        "reference": question.answer,
        "kind": question.kind,
        "prompt_ids": list(prompt.prompt_ids),
    }


def _line(job: _Job, event: Finished) -> Line:
    question = job.question
    return {
        "task": question.task,
        "run": job.run.name,
        "id": question.id,
        "sample": job.request.sample,
        **_asked(job.run, question, job.request.prompt),
        **{name: value for name, value in asdict(event.generation).items() if name != "logprobs"},
    }


class _Graded:
    """Lines are graded and written by a thread of their own, so that decoding does not wait."""

    def __init__(self, output: SharedOutput, grading_seconds: float):
        self._output = output
        self._grader = Grader(grading_seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._futures: deque[Future[None]] = deque()

    def __enter__(self) -> "_Graded":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            while self._futures:
                self._futures.popleft().result()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._grader.close()

    def add(self, line: Line) -> None:
        """Grade the line, which gets its verdict's fields, and append it. Raises what went wrong with one before."""
        while self._futures and self._futures[0].done():
            self._futures.popleft().result()
        self._futures.append(self._thread.submit(self._keep, line))

    def _keep(self, line: Line) -> None:
        line.update(self._grader.grade(line["answer"], line["reference"], line["kind"])._asdict())
        self._output.append([line])
