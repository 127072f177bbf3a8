"""transformers as a contender: its own `generate` on torch, prompts padded on the left."""

from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.throughput.contenders.forcing import force
from benchmarks.throughput.contenders.protocol import serve


class Transformers:
    def load(self, model: str, dtype: str, threads: int) -> dict[str, Any]:
        """Read the model; returns the versions of what runs it."""
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        return {"transformers": transformers.__version__, "torch": torch.__version__, "threads": threads}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` greedy tokens for each prompt, all prompts at once."""
        return self._run(prompts, [new_tokens] * len(prompts), [], min_new_tokens=new_tokens)

    def force(self, prompts: list[list[int]], batch_size: int, **settings: Any) -> list[int]:
        """s1's procedure, `batch_size` prompts at a time; returns each row's number of new tokens."""
        counts = []
        for first in range(0, len(prompts), batch_size):
            counts += force(partial(self._run, min_new_tokens=0), prompts[first : first + batch_size], **settings)
        return counts

    def load_for_training(self, model: str, dtype: str, threads: int) -> dict[str, Any]:
        """Read the model and make an optimiser beside it; returns the versions of what runs it."""
        versions = self.load(model, dtype, threads)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4)
        self._schedule = transformers.get_cosine_schedule_with_warmup(self._optimizer, 50, 1000)
        self._model.train()
        return versions

    def train(self, examples: list[list[int]], batch_size: int, microbatch_size: int) -> float:
        """One pass of optimiser steps, each microbatch padded to its longest example; returns the last step's loss.

        The recipe, schedule and average over a step's tokens are this project's, so that losses are equal.
        """
        for first in range(0, len(examples), batch_size):
            batch = examples[first : first + batch_size]
            total, predicted = torch.zeros(()), sum(len(row) - 1 for row in batch)
            for start in range(0, len(batch), microbatch_size):
                rows = batch[start : start + microbatch_size]
                longest = max(map(len, rows))
                ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
                labels = ids.masked_fill(mask == 0, -100)
                loss = self._model(input_ids=ids, attention_mask=mask, labels=labels).loss
                share = loss * sum(len(row) - 1 for row in rows) / predicted
                share.backward()
                total += share.detach()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        return float(total)

    def _run(
        self, prompts: list[list[int]], limits: list[int], stop: list[int], *, min_new_tokens: int
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        outputs = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(limits),
            min_new_tokens=min_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=stop or None,
            pad_token_id=0,
        )[:, longest:].tolist()
        ends = [next((at for at, token in enumerate(output) if token in stop), len(output)) for output in outputs]
        return [output[: min(end, limit)] for output, end, limit in zip(outputs, ends, limits, strict=True)]


if __name__ == "__main__":
    contender = Transformers()
    serve(
        {
            "load": contender.load,
            "generate": contender.generate,
            "force": contender.force,
            "load_for_training": contender.load_for_training,
            "train": contender.train,
        }
    )
