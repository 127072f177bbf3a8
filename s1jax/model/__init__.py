"""The Qwen decoder: architecture, attention, weights in and out."""
