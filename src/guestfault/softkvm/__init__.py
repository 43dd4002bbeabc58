"""A complete KVM in software: the kernel half of the memory-fault-exit design, made to be run.

:class:`~guestfault.softkvm.system.SoftSystem` is its ``/dev/kvm``.  Inside, functions and
structures carry Linux's names, so that a reader of the kernel finds each in one search:

- :mod:`~guestfault.softkvm.x86` is ``KVM_RUN``'s loop; :mod:`~guestfault.softkvm.cpu` the
  processor;
- :mod:`~guestfault.softkvm.guest_mmu` answers its TLB misses through the guest's page tables,
  :mod:`~guestfault.softkvm.mmu` through the second stage, :mod:`~guestfault.softkvm.pfn` through
  the host's memory (:mod:`~guestfault.softkvm.mm`);
- without two-dimensional paging :mod:`~guestfault.softkvm.shadow_tlb` answers them from shadow
  pages (:mod:`~guestfault.softkvm.shadow_page`), made by :mod:`~guestfault.softkvm.paging_tmpl`;
- :mod:`~guestfault.softkvm.efault` tells userspace of an access that failed;
- :mod:`~guestfault.softkvm.emulator` carries out instructions in the guest's place, with KVM's own
  copies from and to memory (:mod:`~guestfault.softkvm.guest_access`);
- :mod:`~guestfault.softkvm.emulate`, :mod:`~guestfault.softkvm.pio` and
  :mod:`~guestfault.softkvm.exceptions` are what else KVM does for the guest.
"""
