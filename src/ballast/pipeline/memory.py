"""Keep freed memory in the process, where the C library would hand it back after every step.

Training on a CPU frees and takes gigabytes of activations each step. glibc returns large blocks to the
kernel at once, and the kernel zeroes the same pages again a moment later: on a virtual machine a quarter of a
training step was spent there. Two `mallopt` settings keep the blocks; the process then holds its peak.
"""

import ctypes
import platform

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, for the life of this process.

    Returns:
        Whether the C library took it; False where it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
