"""This package compares what was built with the float32 checkpoint."""
