"""What importing the kernels costs a process that may never use them."""

import subprocess
import sys

CODE = """
import sys, numpy
before = set(sys.modules)
import marnet_kernels
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(roots - sys.stdlib_module_names - {"marnet_kernels", "numpy"}))
"""


def test_import_needs_numpy_alone():
    found = subprocess.run(
        [sys.executable, "-c", CODE], check=True, capture_output=True, text=True
    ).stdout.split()
    assert found == []
