"""TensorRT: typed ONNX, the engines that are built from it, and its own reading of both."""
