"""The seam to `transformers`: tracing its modules, and loading our checkpoints into them."""
