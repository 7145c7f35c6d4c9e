"""The parts that backends on NVIDIA GPUs share. Nothing here is imported to classify on a CPU."""
