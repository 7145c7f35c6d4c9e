"""Turn checkpoints into verified bundles."""
