"""Curation: from many questions to a few with reasoning traces, stage by stage in one run directory."""
