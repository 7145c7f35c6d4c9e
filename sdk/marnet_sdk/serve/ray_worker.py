"""A process of Ray that classifies: the threads that it computes with."""

from __future__ import annotations


def reserved_threads() -> int:
    """The CPUs that Ray reserved for this worker, as a number of threads: at least 1.

    Ray counts what its workers reserve and does not stop them from computing with more.
    """
    import ray

    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
