"""The stage attempt: a student model's answer to each question, from an endpoint or from a model computed here."""

from typing import Any

from s1jax.config import GenerateConfig, ModelSection
from s1jax.config_reader import ConfigError
from s1jax.curation.asking import Ask, ask_all, user_turn
from s1jax.curation.endpoint import FailureError
from s1jax.curation.files import read_questions
from s1jax.curation.message import Reply
from s1jax.curation.sections import StudentSection
from s1jax.jsonl import InputError, RowWriter, merge_parts, written_rows
from s1jax.paths import AnyPath
from s1jax.progress import progress
from s1jax.resume import keep_settings


def attempt(name: str, section: StudentSection, output_dir: AnyPath) -> dict[str, int]:
    """Have the student of this name answer all of questions.jsonl; attempts-NAME.jsonl has what came of each.

    An answer cut at its longest length counts as done. Returns the counts of done, failed and unasked. Raises as
    `ask_all` does; for a model computed here also ValueError, OSError or OutOfMemoryError.
    """
    if (section.endpoint.base_url is None) == (section.path is None):
        raise ConfigError(f"attempt {name}: give either endpoint.base_url or path")
    questions = read_questions(output_dir)
    results = output_dir / f"attempts-{name}.jsonl"
    if section.path is not None:
        return _compute(name, section, section.path, questions, results)
    return ask_all(
        f"attempt {name}",
        section.endpoint,
        [Ask(question["id"], user_turn(question["question"] + section.instruction)) for question in questions],
        journal=output_dir / f"responses-{name}.jsonl",
        results=results,
        settings={"instruction": section.instruction},
        fields=("text",),
        read=_read,
    )


def _read(reply: Reply) -> dict[str, Any]:
    if not reply.text and not reply.cut:
        raise FailureError("no answer", "rubbish")
    return {"text": reply.text}


def _compute(
    name: str, section: StudentSection, path: str, questions: list[dict[str, Any]], results: AnyPath
) -> dict[str, int]:
    # Imported here: jax takes seconds, and other stages do without.
    from s1jax.decoding.profiles import prepare_prompt
    from s1jax.decoding.requests import Request, encode_prompt, problem_of, thinking_budget
    from s1jax.decoding.results import Finished
    from s1jax.decoding.setup import build_engine, prepare
    from s1jax.model.fingerprint import model_fingerprint

    model = ModelSection(path=path, dtype=section.dtype)
    same = {key: getattr(section, key) for key in ("path", "dtype", "budget", "instruction")}
    same |= {f"the model's {name}": found for name, found in model_fingerprint(model).items()}
    keep_settings(same, results, results.with_name(results.name + ".config.json"))
    config = GenerateConfig(
        model=model,
        budget=section.budget,
        batch_size=section.batch_size,
        mesh=section.mesh,
    )
    setup, budget = prepare(config), thinking_budget(section.budget, None)
    status = {row["id"]: row["status"] for row in written_rows(results, id=str, status=str)}
    requests, failed = [], []
    for index, question in enumerate(questions):
        if question["id"] not in status:
            try:
                encoded = encode_prompt(question["question"] + section.instruction, setup.tokenizer, chat_template=True)
            except ValueError as error:
                raise InputError(f"attempt {name}: question {question['id']}: {error}") from None
            request = Request(prepare_prompt(encoded.input_ids, setup.profile, encoded.after_user), budget, index)
            problem = problem_of(request, setup.profile, setup.context_length)
            if problem:
                failed.append({"id": question["id"], "status": "failed", "reason": problem, "text": None})
            else:
                requests.append(request)
    events = build_engine(config, setup, len(requests)).run(requests) if requests else ()
    with (
        RowWriter(results) as writer,
        progress("question", len(requests), name=f"attempt {name}") as bar,
    ):
        writer.append(failed)
        for event in events:
            if isinstance(event, Finished):
                row = {"id": questions[event.request.index]["id"], "status": "done", "reason": None}
                writer.append([{**row, "text": event.generation.answer.strip()}])
            bar.update(isinstance(event, Finished))
    merge_parts(results, key=lambda row: row["id"])
    num_failed = sum(ended == "failed" for ended in status.values()) + len(failed)
    return {"done": len(questions) - num_failed, "failed": num_failed, "unasked": 0}
