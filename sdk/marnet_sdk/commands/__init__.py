"""The commands `marnet-classify` and `marnet-doctor`, and what they alone need."""
