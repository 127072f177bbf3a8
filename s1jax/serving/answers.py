"""Answers as OpenAI's API has them, whole and in parts; what only this server has stands under `s1jax`."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from s1jax.decoding.profiles import ProfileIds
from s1jax.decoding.requests import Request
from s1jax.decoding.results import Finished, Progress
from s1jax.serving.asks import Ask
from s1jax.serving.body import ChatBody
from s1jax.serving.text import AnswerText, Piece, joined
from s1jax.tokenizer import decode

Json = dict[str, Any]

_FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}


class Choice:
    """One of the answers to a request, as far as it has come."""

    def __init__(self, ask: Ask, request: Request, tokenizer: PreTrainedTokenizerBase, profile: ProfileIds):
        self._tokenizer, self._before = tokenizer, request.prompt.num_thinking_tokens
        self._text = AnswerText(tokenizer, profile, ask.body.stops)
        self.request = request
        self.pieces: list[Piece] = []
        self.output_ids: list[int] = []
        self.forced: list[bool] = []
        self.logprobs: list[float] = []
        self.num_thinking_tokens = 0
        """Of the output."""
        self.num_waits = 0
        self.thinking_end: str | None = None
        self.num_sent = 0
        """Tokens of which a stream has sent the log-probabilities."""
        self.finish_reason: str | None = None

    def take(self, event: Progress | Finished) -> list[Piece]:
        """What an event adds; with one in which a stop text comes, or the last, `finish_reason` is set."""
        begin = len(self.output_ids)
        if isinstance(event, Finished):
            done = event.generation
            assert done.logprobs is not None, "the engine of a server computes them"
            new = done.output_ids[begin:], done.forced[begin:], done.logprobs[begin:]
            self.num_thinking_tokens = done.num_thinking_tokens - self._before
            self.num_waits, self.thinking_end = done.num_waits, done.thinking_end
            reason = _FINISH_REASONS[done.finish_reason or "stop"]
        else:
            new = event.output_ids, event.forced, event.logprobs
            self.num_thinking_tokens = event.num_thinking_tokens
            self.num_waits, self.thinking_end = event.num_waits, event.thinking_end
            reason = None
        ids, forced, logprobs = new
        pieces = self._text.take(ids, forced, self.num_thinking_tokens)
        if reason and not self._text.stopped:
            pieces += self._text.end()
        taken = self._text.num_tokens - begin
        self.output_ids += ids[:taken]
        self.forced += forced[:taken]
        self.logprobs += logprobs[:taken]
        self.finish_reason = "stop" if self._text.stopped else reason
        self.pieces += pieces
        return pieces

    def text(self, kind: str) -> str:
        """All of one kind so far."""
        return "".join(piece.text for piece in self.pieces if piece.kind == kind)

    def report(self, ask: Ask) -> Json:
        """What only this server says of an answer."""
        report: Json = {
            "thinking_end": self.thinking_end,
            "num_waits": self.num_waits,
            "num_forced_tokens": sum(self.forced),
        }
        if ask.body.return_token_ids:
            report["prompt_ids"] = list(self.request.prompt.prompt_ids)
            report["output_ids"], report["forced"] = self.output_ids, self.forced
        return report

    def visible(self, ask: Ask, pieces: Sequence[Piece]) -> list[Piece]:
        """These pieces as the client wants them."""
        shown = [piece for piece in pieces if not (ask.exclude and piece.kind == "reasoning")]
        return joined(shown, by_forced=bool(ask.body.mark_forced))

    def logprobs_json(self, ask: Ask, begin: int = 0) -> Json | None:
        """Of the tokens from `begin` on, in the form of the request's kind; None unless asked for."""
        if not ask.body.wants_logprobs:
            return None
        tokens = [decode([token], self._tokenizer) for token in self.output_ids[begin:]]
        logprobs = self.logprobs[begin:]
        if not isinstance(ask.body, ChatBody):
            return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None}
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        return {"content": content}


class Answer:
    """The answer to a request, for all its choices."""

    def __init__(self, ask: Ask, model: str, tokenizer: PreTrainedTokenizerBase, profile: ProfileIds):
        self._ask, self._chat = ask, isinstance(ask.body, ChatBody)
        self.choices = [Choice(ask, request, tokenizer, profile) for request in ask.requests]
        kind = "chat.completion" if self._chat else "text_completion"
        prefix = "chatcmpl" if self._chat else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._model = model

    @property
    def id(self) -> str:
        """By which a log has it."""
        return str(self._head["id"])

    def usage(self) -> Json:
        """Tokens of all choices; a prompt that has several counts once."""
        prompts = {id(choice.request.prompt): len(choice.request.prompt.prompt_ids) for choice in self.choices}
        output = sum(len(choice.output_ids) for choice in self.choices)
        thinking = sum(choice.num_thinking_tokens for choice in self.choices)
        return {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": output,
            "total_tokens": sum(prompts.values()) + output,
            "completion_tokens_details": {"reasoning_tokens": thinking},
        }

    def whole(self) -> Json:
        """The body of an answer that is not streamed."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._head, "model": self._model, "choices": choices, "usage": self.usage()}

    def _whole_choice(self, index: int, choice: Choice) -> Json:
        reasoning = None if self._ask.exclude else choice.text("reasoning")
        thoughts = {"reasoning": reasoning, "reasoning_content": reasoning}
        content = choice.text("content")
        report = choice.report(self._ask)
        if self._ask.body.mark_forced:
            # In a stream, each piece has come with its own mark.
            report["pieces"] = [vars(piece) for piece in choice.visible(self._ask, choice.pieces)]
        said = {"message": {"role": "assistant", "content": content, **thoughts}} if self._chat else {"text": content}
        return {
            "index": index,
            **said,
            **({} if self._chat else thoughts),
            "logprobs": choice.logprobs_json(self._ask),
            "finish_reason": choice.finish_reason,
            "s1jax": report,
        }

    def first_part(self) -> Json:
        """What a streamed chat begins with."""
        return self._part([self._part_choice(index, {"role": "assistant"}) for index in range(len(self.choices))])

    def parts(self, index: int, pieces: Sequence[Piece]) -> list[Json]:
        """What is streamed of new pieces of a choice; the first has the log-probabilities of the tokens since."""
        choice = self.choices[index]
        parts = []
        for piece in choice.visible(self._ask, pieces):
            named = {"reasoning": piece.text, "reasoning_content": piece.text}
            part = self._part_choice(index, named if piece.kind == "reasoning" else {"content": piece.text})
            if self._ask.body.mark_forced:
                part["s1jax"] = {"forced": piece.forced}
            part["logprobs"] = self._new_logprobs(choice)
            parts.append(self._part([part]))
        if choice.finish_reason:
            last = self._part_choice(index, {})
            last |= {"finish_reason": choice.finish_reason, "s1jax": choice.report(self._ask)}
            last["logprobs"] = self._new_logprobs(choice)
            parts.append(self._part([last]))
        return parts

    def _new_logprobs(self, choice: Choice) -> Json | None:
        begin, choice.num_sent = choice.num_sent, len(choice.output_ids)
        return choice.logprobs_json(self._ask, begin) if begin < choice.num_sent else None

    def usage_part(self) -> Json:
        """The last part of a stream, if it is asked for."""
        return {**self._part([]), "usage": self.usage()}

    def _part_choice(self, index: int, delta: Json) -> Json:
        if self._chat:
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        thoughts = {key: value for key, value in delta.items() if key.startswith("reasoning")}
        text = delta.get("content", "")
        return {"index": index, "text": text, **thoughts, "logprobs": None, "finish_reason": None}

    def _part(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "model": self._model, "choices": choices}
