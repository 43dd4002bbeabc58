"""The smallest VMM that restores a snapshot with none of its memory present, and what came of it.

- :mod:`~guestfault.vmm.session`: a VM from a snapshot, its vCPU threads, stop and resume;
- :mod:`~guestfault.vmm.vcpu_loop`: what one vCPU thread does with each KVM_RUN;
- :mod:`~guestfault.vmm.console`: the ports on which the built-in guests report;
- :mod:`~guestfault.vmm.choice`: which KVM to run on, and why;
- :mod:`~guestfault.vmm.report`: the account at the end.
"""
