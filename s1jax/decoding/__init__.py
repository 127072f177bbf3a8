"""Inference: scoring, and generation with thinking budgets enforced inside the compiled loop."""
