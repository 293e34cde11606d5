"""What is told of the machine, and of the memory that a run took."""

import sys
from pathlib import Path

import pytest

from helpers import spawn

PROBE = """
import mmap, sys
from gskd.environment import peak_memory
before = peak_memory()
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
assert sum(mapped[::4096]) == 0
after_mapping = peak_memory()
held = bytearray(300 * 2**20)
print(before, after_mapping, peak_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells mapped files apart")
def test_mapped_files_are_no_memory_of_the_run(tmp_path: Path) -> None:
    """A cache of many gigabytes is mapped; the kernel takes its pages back when memory is short."""
    (tmp_path / "big").write_bytes(bytes(300 * 2**20))
    here = bytearray(700 * 2**20)  # a child begins as a copy of what starts it, which is no memory of the child either
    here[::4096] = b"\1" * len(here[::4096])
    process = spawn(tmp_path / "big", launcher=("-c", PROBE))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    before, mapped, held = map(float, said.split())
    assert before < 0.6
    assert mapped - before < 0.1
    assert 0.25 < held - mapped < 0.35
