"""What is random in reverse sampling, and the tables that hold it. All of it is NumPy."""
