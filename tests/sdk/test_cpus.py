"""Threads follow the CPUs that a process may use: affinity, cores and the quota of its groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quick import kept

from marnet_sdk import Classifier
from marnet_sdk.backends import BACKENDS
from marnet_sdk.cpus import (
    Cpus,
    check_threads,
    count_cores,
    cpus,
    int8_sums_overflow,
    quota,
    wait_briefly,
)
from marnet_sdk.errors import InvalidInput

# A bundle of aotinductor takes a minute of g++; `make test` has it in test_builder_aotinductor.
ON_A_CPU = kept(sorted(set(BACKENDS) - {"tensorrt"}), {"onnxruntime", "openvino", "torchscript"})
V1 = "31 23 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2 = "31 23 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw"
OTHER = "30 23 0:25 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def tree(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder with proc/self and sys/fs/cgroup as Linux has them."""
    everything = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v1(folder: str, time: int, period: int = 100_000) -> dict[str, str]:
    at = f"sys/fs/cgroup/cpu,cpuacct{folder}/cpu.cfs"
    return {f"{at}_quota_us": str(time), f"{at}_period_us": str(period)}


def v2(folder: str, granted: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{folder}/cpu.max": granted}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        ("0::/", V2, v2("", "150000 100000"), 1.5),
        ("0::/", V2, v2("", "max 100000"), None),
        ("0::/", V2, {}, None),
        ("0::/pod/app", V2, v2("/pod", "100000 100000") | v2("/pod/app", "max 100000"), 1.0),
        ("0::/pod/app", V2, v2("/pod", "400000 100000") | v2("/pod/app", "50000 100000"), 0.5),
        # The group's path on the host, of which the container sees its own folder alone.
        ("0::/kubepods/pod7/x", V2, v2("", "200000 100000"), 2.0),
        ("0::/../other", V2, v2("", "200000 100000"), 2.0),
        ("5:memory:/a\n4:cpu,cpuacct:/", f"{OTHER}\n{V1}", v1("", 100_000), 1.0),
        ("4:cpuacct,cpu:/", f"{OTHER}\n{V1}", v1("", -1), None),
        ("4:cpu,cpuacct:/docker/7", V1, v1("", -1) | v1("/docker/7", 75_000, 50_000), 1.5),
        ("4:cpu,cpuacct:/docker/7", V1.replace("0:26 /", "0:26 /docker/7"), v1("", 50_000), 0.5),
        # Both versions at once, with the controller in the first.
        (
            "4:cpu:/\n0::/",
            f"{V1}\n{V2.replace('/sys/fs/cgroup', '/sys/fs/cgroup/unified')}",
            v1("", 300_000),
            3.0,
        ),
        ("0::/", V2, v2("", "0 100000"), None),
        ("0::/", V2, v2("", "100000 0"), None),
        ("0::/", V2, v2("", "much"), None),
        ("emulated", V2, {}, None),
        ("0::/", "emulated", {}, None),
    ],
)
def test_the_least_that_a_group_around_the_process_grants_is_its_quota(
    tmp_path, groups, mounts, files, expected
):
    assert quota(tree(tmp_path, groups, mounts, files)) == expected


def test_where_there_are_no_groups_no_limit_is_known(tmp_path):
    assert quota(tmp_path) is None
    here = cpus(tmp_path)
    assert here.quota is None
    assert here.threads == here.cores == here.allowed <= here.machine


def test_two_cpus_of_one_core_are_one_thread(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert [count_cores(mask, tmp_path) for mask in ({0, 1, 2, 3}, {0, 2}, {1}, {0, 7})] == [
        2, 1, 1, 2,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("here", "threads", "limited"),
    [
        (Cpus(64, 64, 32, None), 32, False),
        (Cpus(64, 64, 32, 1.0), 1, True),
        (Cpus(64, 64, 32, 1.5), 2, True),
        (Cpus(64, 64, 32, 0.25), 1, True),
        (Cpus(64, 4, 2, 8.0), 2, True),
        (Cpus(4, 4, 4, 16.0), 4, False),
    ],
)
def test_threads_are_the_cores_bounded_by_the_quota_rounded_up(here, threads, limited):
    assert (here.threads, here.limited) == (threads, limited)


def test_the_affinity_mask_counts():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from marnet_sdk.cpus import cpus; print(cpus().allowed, cpus().threads)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_more_threads_than_the_machine_has_are_refused_with_what_there_is(bundle_of):
    most = os.cpu_count() or 1
    assert (check_threads(None), check_threads(most)) == (None, most)
    message = rf"threads: got {most + 1}, but this machine has {most} CPUs; pass at most"
    with pytest.raises(InvalidInput, match=message):
        check_threads(most + 1)
    with pytest.raises(InvalidInput, match=message):
        Classifier(bundle_of("onnxruntime", "fp16"), threads=most + 1)


@pytest.fixture
def two_threads(monkeypatch) -> Iterator[None]:
    """A process in which torch has two threads that the user did not choose."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_a_quota_of_one_cpu_is_one_thread_and_the_runtime_says_so(
    bundle_of, backend, monkeypatch, two_threads
):
    monkeypatch.setattr("marnet_sdk.cpus.quota", lambda root: 1.0)
    runtime = Classifier(bundle_of(backend, "fp32")).runtime
    assert (runtime.device, runtime.threads) == ("cpu", 1)
    assert runtime.cpus.endswith("with a quota of 1")


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_threads_that_are_asked_for_are_used(bundle_of, backend, monkeypatch, two_threads):
    monkeypatch.setattr("marnet_sdk.cpus.os.cpu_count", lambda: 2)
    monkeypatch.setattr("marnet_sdk.cpus.quota", lambda root: 1.0)
    assert Classifier(bundle_of(backend, "fp32"), threads=2).runtime.threads == 2


@pytest.mark.parametrize("backend", kept(["torchscript", "aotinductor"], {"torchscript"}))
def test_a_number_of_threads_that_the_user_gave_openmp_stands(
    bundle_of, backend, monkeypatch, two_threads
):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("marnet_sdk.cpus.quota", lambda root: 1.0)
    assert Classifier(bundle_of(backend, "fp32")).runtime.threads == 2


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_says_about_waiting_stands(monkeypatch, name):
    for known in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "ACTIVE")
    before = dict(os.environ)
    wait_briefly()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import marnet_train, torch", marks=pytest.mark.slow),
        "from marnet_sdk.backends.torch_device import check_types as c; c('x', 'fp32', 'cpu')",
    ],
)
def test_openmp_s_waiting_threads_spin_briefly(code):
    """As libgomp itself reports it, which torch has loaded."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GOMP_SPINCOUNT = '20000'" in done.stderr


@pytest.mark.parametrize(("before", "expected"), [(None, "21"), ("4", "4")])
def test_numpy_s_waiting_threads_spin_briefly_or_as_the_user_says(before, expected):
    name = "OPENBLAS_THREAD_TIMEOUT"
    kept = {k: v for k, v in os.environ.items() if k != name}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import marnet_sdk, os; print(os.environ['OPENBLAS_THREAD_TIMEOUT'])",
        ],
        env=kept | ({} if before is None else {name: before}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("flags", "overflows"),
    [
        ("sse4_2 avx2 fma", True),
        ("avx2 avx_vnni", False),
        ("avx2 avx512_vnni", False),
        ("asimd", 0),
    ],
)
def test_sums_of_int8_overflow_on_x86_without_vnni(flags, overflows, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_: f"flags : {flags}")
    assert int8_sums_overflow() == overflows
