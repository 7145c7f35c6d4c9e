"""The parts that backends on NVIDIA GPUs share. ONNX Runtime and OpenVINO import none of it."""
