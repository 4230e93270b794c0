"""Checkpoints that come packed already: read as the values they mean, one matrix at a time."""
