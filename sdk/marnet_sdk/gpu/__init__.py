"""The parts that backends on NVIDIA GPUs share. Without a GPU or torch nothing here is imported."""
