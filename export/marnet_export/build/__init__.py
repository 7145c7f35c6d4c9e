"""This package builds what a backend runs from a lowered model: one file per backend."""
