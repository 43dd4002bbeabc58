"""The lab: real kernels, started here, with a real ``kvm_amd`` or ``kvm_intel`` inside.

Whatever this package claims of Linux can be asked of Linux.  QEMU emulates, in software, a
processor with SVM and nested paging, so that an unmodified kernel under it offers a real
``/dev/kvm`` on any machine; Bochs, more slowly, one with VMX and EPT.  A command runs there, and
its output, its exit status and its files come back.  The kernel is one of Debian's, fetched by name
(:mod:`~guestfault.lab.kernels`), or the one that somebody just built
(:mod:`~guestfault.lab.image`).

:func:`guestfault.lab.machine.run` is the whole of it::

    from guestfault.lab.kernels import find_kernel
    from guestfault.lab.machine import run

    result = run(find_kernel("6.18"), ["guestfault", "check"], npt=False)
    print(result.status, result.stdout.decode())

A machine is put together from a kernel, the layers of an initramfs
(:mod:`~guestfault.lab.initramfs`: Python, its libraries, this package, KVM's modules, the job), and
an emulator, which :mod:`~guestfault.lab.process` starts: :mod:`~guestfault.lab.qemu`, or
:mod:`~guestfault.lab.bochs` with a :mod:`~guestfault.lab.boot_disk`.  Inside,
:mod:`~guestfault.lab.inside` is the first process;
the two sides speak in frames (:mod:`~guestfault.lab.frames`) over a serial port of their own.
``docs/lab.md`` is for those who only use it.
"""
