"""OpenVINO: its graphs, the loop in one of them, and what they execute."""
