"""Many callers at once: what they ask for is collected into batches."""
