"""The plain reverse loop in other frameworks than torch, as each of them runs it best.

They are measured from a checkout; no wheel has them. Axes: as in `marnet_bench.plain_loop`.
"""

from __future__ import annotations

from loop_peers.onnx_scan import onnx_scan, onnx_scan_dynamic, onnx_scan_sleeping
from loop_peers.openvino_loops import openvino_iterator, openvino_loop
from marnet_bench.plain_loop import TORCH_PEERS, Peer

PEERS = {
    **TORCH_PEERS,
    "ONNX Runtime Scan": Peer(onnx_scan),
    "ONNX Runtime Scan, dynamic": Peer(onnx_scan_dynamic, ("int8",)),
    "ONNX Runtime Scan, sleeping": Peer(onnx_scan_sleeping, ("fp32", "int8")),
    "OpenVINO Loop": Peer(openvino_loop),
    "OpenVINO TensorIterator": Peer(openvino_iterator),
}
