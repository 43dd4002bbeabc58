"""KVM as ``/dev/kvm`` offers it: one object for each of its three levels of file descriptor.

:class:`KvmSystem` is ``/dev/kvm``, :class:`KvmVm` a virtual machine made from it, :class:`KvmVcpu`
a virtual CPU of that machine.  They are thin: one method, one ioctl; what is refused raises
:class:`~guestfault.errors.KvmError` with the numbers, and ``KVM_RUN`` alone never raises, because
its failures are what this package is about.

>>> from contextlib import closing
>>> with closing(KvmSystem()) as system, closing(system.create_vm()) as vm:  # doctest: +SKIP
...     vm.set_user_memory_region(0, 0, len(ram), hva)
...     vcpu = vm.create_vcpu(0)
...     print(outcome(vcpu.run(), vcpu.kvm_run, probe(vm.check_extension)))

The interface that they share with the software KVM is in :mod:`guestfault.kvm.protocols`; how one
thread interrupts another inside ``KVM_RUN``, which has more to it than it seems, in
:mod:`guestfault.kvm.kick`.
"""

from guestfault.kvm.protocols import System, Vcpu, Vm
from guestfault.kvm.system import KvmSystem
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.kvm.vm import KvmVm

__all__ = ["KvmSystem", "KvmVcpu", "KvmVm", "System", "Vcpu", "Vm"]
