"""The tables and figures of a method: every row over training seeds, with its controls."""
