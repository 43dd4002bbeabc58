"""Guest RAM: where a guest's memory lies in ours, and how its pages can be absent.

- :mod:`~guestfault.memory.ram`: a memfd mapped twice.  KVM gets the *guest view*; our own code
  reads and writes the *host view* only.
- :mod:`~guestfault.memory.view`: three ways in which a page of the guest view can be absent, and
  how it is let in.
- :mod:`~guestfault.memory.slots`: guest physical to host virtual addresses and back.
"""
