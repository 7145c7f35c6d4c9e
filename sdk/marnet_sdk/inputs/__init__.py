"""The way from whatever shows an image to the array that a model takes."""
