"""Inference: scoring and generation."""
