"""Why the host could not serve a guest's access, from what the host shows of the page behind it.

``-EFAULT`` stands for some twenty different situations, from an ``munmap`` too early to a full
``/dev/shm``, and the kernel tells none from another.  But the evidence is still lying about when
``KVM_RUN`` has returned: the mapping and its rights in ``/proc/PID/smaps``, the page table entry in
``pagemap``, the file's size and what it holds, the counters of file systems, pools and control
groups.  Looking at it changes nothing: no page is faulted in, nobody is woken.

- :mod:`~guestfault.fault.cause.record`: what an answer is, a :class:`~.record.Cause`.
- :mod:`~guestfault.fault.cause.evidence`: what is looked at, gathered live or put together by hand
  from text that another machine left.
- :mod:`~guestfault.fault.cause.judge`: from evidence to causes, in the order in which the kernel
  comes upon them; :mod:`~guestfault.fault.cause.absent` is its second half.
- :mod:`~guestfault.fault.cause.why`: both in one call.
"""
