"""Measure bundles against their peers."""
