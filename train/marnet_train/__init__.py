"""Train MARNet checkpoints."""
