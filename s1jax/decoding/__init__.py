"""Decoding: thinking budgets enforced inside the compiled loop."""
