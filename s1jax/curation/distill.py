"""The stage distill: a teacher's reasoning trace and answer for each question."""

from typing import Any

from s1jax.curation.asking import Ask, ask_all, user_turn
from s1jax.curation.endpoint import FailureError
from s1jax.curation.files import read_questions
from s1jax.curation.message import Reply
from s1jax.curation.sections import DistillSection
from s1jax.paths import AnyPath


def distill(section: DistillSection, output_dir: AnyPath) -> dict[str, int]:
    """Ask the teacher all of questions.jsonl; traces.jsonl has what came of each, responses.jsonl the raw responses.

    Returns the counts of done, failed and unasked. Raises as `ask_all` does.
    """
    asks = [
        Ask(question["id"], user_turn(question["question"] + section.instruction))
        for question in read_questions(output_dir)
    ]
    return ask_all(
        "distill",
        section.endpoint,
        asks,
        journal=output_dir / "responses.jsonl",
        results=output_dir / "traces.jsonl",
        settings={"instruction": section.instruction},
        fields=("trace", "answer"),
        read=_read,
    )


def _read(reply: Reply) -> dict[str, Any]:
    if reply.cut:
        raise FailureError("cut at max_tokens", "final")
    if not reply.trace or not reply.text:
        missing = " and no ".join(name for name, text in (("trace", reply.trace), ("answer", reply.text)) if not text)
        raise FailureError(f"no {missing}", "rubbish")
    if any(tag in reply.text for tag in ("<think>", "</think>")):
        raise FailureError("think tags in the answer", "rubbish")
    return {"trace": reply.trace, "answer": reply.text}
