"""All that is random in reverse sampling, and the tables that hold it, in NumPy."""
