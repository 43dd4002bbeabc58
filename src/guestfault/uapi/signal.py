"""What comes with a ``SIGBUS``: its codes, and where ``siginfo`` has the address.

Python's :mod:`signal` has the number of the signal and not what it was sent for: its
``struct_siginfo`` leaves out the address and what the address is the beginning of.  The facts come
from ``include/uapi/asm-generic/siginfo.h``, which x86 uses unchanged, and ``asm/unistd_64.h``.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_int, c_short, c_void_p
from typing import Final

# siginfo.si_code: above 0 the kernel speaks, at and below 0 a process (kill(2)).
SI_USER: Final = 0
SI_KERNEL: Final = 0x80

# The same of a SIGBUS
BUS_ADRALN: Final = 1
BUS_ADRERR: Final = 2
BUS_OBJERR: Final = 3
BUS_MCEERR_AR: Final = 4  # action required: an access met broken memory
BUS_MCEERR_AO: Final = 5  # action optional: memory broke that nobody has accessed since

SYS_rt_sigtimedwait: Final = 128
SYS_rt_tgsigqueueinfo: Final = 297


class _siginfo(Structure):
    _fields_ = [
        ("si_signo", c_int),
        ("si_errno", c_int),
        ("si_code", c_int),
        # From here on as the signals of failed accesses have it.
        ("si_addr", c_void_p),
        ("si_addr_lsb", c_short),
    ]


class siginfo(Union):
    _anonymous_ = ("_",)
    _fields_ = [("_", _siginfo), ("_si_pad", c_int * 32)]
