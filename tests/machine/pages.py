"""Which pages of a tensor that lies in a file are in memory."""

import mmap
import struct
from pathlib import Path


def resident(tensor):
    """How many of a mapped tensor's bytes are in memory; Linux only."""
    pages = range(tensor.data_ptr() // mmap.PAGESIZE, -(-(tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE))
    with Path("/proc/self/pagemap").open("rb", buffering=0) as opened:
        opened.seek(8 * pages[0])
        entries = struct.unpack(f"{len(pages)}Q", opened.read(8 * len(pages)))
    return sum(entry >> 63 for entry in entries) * mmap.PAGESIZE
