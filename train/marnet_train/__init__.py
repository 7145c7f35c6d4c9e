"""Train MARNet checkpoints."""

from marnet_sdk.cpus import wait_briefly

wait_briefly()  # before any module of this package imports torch
