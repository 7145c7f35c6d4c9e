"""What was built is held against the float32 checkpoint."""
