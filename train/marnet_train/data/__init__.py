"""Training data: image, label and privileged text."""
