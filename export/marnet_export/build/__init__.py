"""What a backend runs, built from a lowered model: one file per backend."""
