"""s1 in JAX: fine-tune Qwen on reasoning traces, then control how long it thinks inside the compiled loop."""
