"""Published versions of the memory-fault-exit interface, as data.

Both halves need them: the software KVM to behave like one, and :mod:`guestfault.fault` to read what
a KVM, software or real, has said.  So they live below both.
"""
