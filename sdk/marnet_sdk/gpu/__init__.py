"""The parts that backends on NVIDIA GPUs share. Runtimes of CPUs import none of it."""
