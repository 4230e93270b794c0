"""Measuring a model: perplexity over documents, tasks, and the statistics that say what a difference is worth."""
