"""An OpenAI-style server in which thinking budgets hold."""
