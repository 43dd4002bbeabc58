"""What each KVM does in each case: real kernels and the software KVM, asked the same questions.

A *case* is a host condition, an access and a processor mode: what is the matter with a page, what a
guest does to it, and where the guest runs.  Each is put to a KVM through the ordinary interface
(:mod:`guestfault.kvm.protocols`) by a guest of four instructions, and everything that comes back is
recorded: the result of ``KVM_RUN``, ``exit_reason``, which bytes of the exit's union were written
(it is filled with a pattern before), where RIP stands, what a second ``KVM_RUN`` does, and what
happens once the condition is mended.  A call that does not come back is a result too.

=====================================  ==========================================================
:mod:`~guestfault.conform.condition`   what may be the matter with the page, and how it is mended
                                       (:mod:`~guestfault.conform.plain`,
                                       :mod:`~guestfault.conform.userfault`,
                                       :mod:`~guestfault.conform.guest_memfd`)
:mod:`~guestfault.conform.guests`      the accesses
:mod:`~guestfault.conform.case`        which of them make a case
:mod:`~guestfault.conform.scripts`     in which order a case is asked
:mod:`~guestfault.conform.observe`     one ``KVM_RUN``, and all there is to see of it
:mod:`~guestfault.conform.document`    the results of many, as JSON
:mod:`~guestfault.conform.compare`     what differs between two
:mod:`~guestfault.conform.differential`  the software KVM against a real one, with the reasons
=====================================  ==========================================================

``docs/conform.md`` is for those who only use it; ``docs/kernels.md`` has the results.
"""
