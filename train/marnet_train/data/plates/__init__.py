"""Synthetic cookery photographs whose text says what is on the plate."""
