"""What a step frees stays in the process, so that the next step does not fault it in again."""

import platform
import subprocess
import sys

import pytest

# Large blocks taken and freed again and again; prints the page faults of the later rounds.
ROUNDS = """
import resource, sys
from ballast.pipeline.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    blocks = [bytearray(64 << 20) for _ in range(4)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
for _ in range(3): last = faults()
print(last - first)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_not_faulted_in_again():
    # 3 rounds of 256 MiB are 196,608 pages of 4 KiB where the C library gives them back each time.
    assert page_faults("keep") < 0.2 * page_faults("leave")


def test_another_c_library_is_left_alone(monkeypatch):
    from ballast.pipeline import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False
