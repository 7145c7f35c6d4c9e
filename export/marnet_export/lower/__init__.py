"""A method's model as what the builders take."""
