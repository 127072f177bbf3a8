"""vLLM's CPU build as a contender: continuous batching, prefixes cached, token ids in and out."""

import os
from typing import Any

from benchmarks.throughput.contenders.forcing import force
from benchmarks.throughput.contenders.protocol import serve


class VLLM:
    def load(self, model: str, dtype: str, threads: int) -> dict[str, Any]:
        """Read the model; returns the versions of what runs it."""
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        import torch
        import vllm

        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(
            model, dtype=dtype, skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=32, disable_log_stats=True
        )
        return {"vllm-cpu": vllm.__version__, "torch": torch.__version__, "threads": threads}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` greedy tokens for each prompt, all prompts at once."""
        # As in a first run: what an earlier round left in the prefix cache would make prefill free.
        self._engine.reset_prefix_cache()
        return self._run(prompts, [new_tokens] * len(prompts), [], ignore_eos=True)

    def force(self, prompts: list[list[int]], batch_size: int, **settings: Any) -> list[int]:
        """s1's procedure, all prompts at once; returns each row's number of new tokens."""
        self._engine.reset_prefix_cache()
        return force(self._run, prompts, **settings)

    def _run(
        self, prompts: list[list[int]], limits: list[int], stop: list[int], *, ignore_eos: bool = False
    ) -> list[list[int]]:
        params = [
            self._params(
                temperature=0.0, max_tokens=limit, stop_token_ids=stop, ignore_eos=ignore_eos, detokenize=False
            )
            for limit in limits
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = [list(o.outputs[0].token_ids) for o in self._engine.generate(requests, params, use_tqdm=False)]
        return [output[:-1] if output and output[-1] in stop else output for output in outputs]


if __name__ == "__main__":
    contender = VLLM()
    serve({"load": contender.load, "generate": contender.generate, "force": contender.force})
