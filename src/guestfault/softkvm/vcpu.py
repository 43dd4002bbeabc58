"""The vCPU as userspace holds it: the ioctls of a vCPU file descriptor, in software."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator

from guestfault.errors import KvmError
from guestfault.softkvm.cpu import Cpu
from guestfault.softkvm.guest_mmu import read_guest_virt, tlb_fill, translate
from guestfault.softkvm.kvm_host import (
    Kvm,
    KvmVcpu,
    Request,
    kvm_check_request,
    kvm_make_request,
    vcpu_load,
    vcpu_put,
)
from guestfault.softkvm.mmio import DeviceAccesses
from guestfault.softkvm.processor import GPRS, Access, Hooks
from guestfault.softkvm.refusal import AccessFailed, Retry
from guestfault.softkvm.x86 import kvm_arch_vcpu_ioctl_run
from guestfault.uapi import kvm as uapi
from guestfault.x86.paging import AccessKind, Translation
from guestfault.x86.registers import CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR4_PAE, EFER_LMA, EFER_LME

__all__ = ["RUN_AREA_SIZE", "SoftVcpu"]

_RETRY = Retry()
_FETCH = int(Access.FETCH)
RUN_AREA_SIZE = 3 * 4096  # kvm_run, the port I/O page, the coalesced MMIO ring: as the kernel's


class SoftVcpu:
    """See :class:`guestfault.kvm.protocols.Vcpu`.  Made by ``SoftVm.create_vcpu``."""

    def __init__(self, kvm: Kvm, vcpu_id: int) -> None:
        area = bytearray(RUN_AREA_SIZE)
        self._view = memoryview(area)
        self._mutex = threading.Lock()  # vcpu->mutex: one ioctl at a time
        self._kick_lock = threading.RLock()  # a signal handler may kick in the midst of run()
        self._kicked = False
        self._closed = False
        self.arch = KvmVcpu(kvm, vcpu_id, uapi.kvm_run.from_buffer(area), self._view)
        self._devices = DeviceAccesses()
        hooks = Hooks(self._on_tlb_miss, self._fetch, self._devices.on_read, self._devices.on_write)
        self.arch.cpu = (kvm.make_processor or Cpu)(hooks)
        self.arch.cpu.write_gprs({"rip": 0xFFF0, "rflags": 2, "rdx": 0x600})
        _reset(self.arch.sregs)

    @property
    def vcpu_id(self) -> int:
        """The id it was created with."""
        return self.arch.vcpu_id

    @property
    def kvm_run(self) -> uapi.kvm_run:
        """``struct kvm_run``, live."""
        return self.arch.run

    @property
    def run_area(self) -> memoryview:
        """The whole shared area."""
        return self._view

    def run(self) -> int:
        """``KVM_RUN``: 0 or a negative errno; -EBADF once the vCPU is closed."""
        vcpu = self.arch
        ret = 0
        with self._mutex:
            if self._closed:
                return -errno.EBADF
            vcpu_load(vcpu)
            vcpu.thread = threading.get_ident()
            try:
                ret = kvm_arch_vcpu_ioctl_run(vcpu, self._devices)
            finally:
                vcpu.thread = None
                vcpu_put()
                with self._kick_lock:
                    kvm_check_request(vcpu, Request.SIGNAL)
                    if ret == -errno.EINTR and self._kicked:
                        self._kicked = False
                        vcpu.run.immediate_exit = 0
        return ret

    def kick(self) -> None:
        """Make :meth:`run` return -EINTR: see :meth:`guestfault.kvm.protocols.Vcpu.kick`."""
        with self._kick_lock:
            self._kicked = True
            self.arch.run.immediate_exit = 1
            if self.arch.thread is not None:
                kvm_make_request(self.arch, Request.SIGNAL)

    # -- the processor's questions: KVM answers outside guest mode ---------------------------------

    def _on_tlb_miss(self, gva: int, access: int) -> tuple[int, int] | None:
        vcpu = self.arch
        vcpu.in_guest_mode = False
        vcpu.refresh_cpl()
        answer = tlb_fill(vcpu, gva, access)
        vcpu.in_guest_mode = True
        if answer is None:
            vcpu.refused_fetch = gva if access == _FETCH else None
        elif vcpu.requests or vcpu.mapped_memslots is not vcpu.kvm.memslots:
            # The answer may be stale, for whoever made the request saw us outside guest mode, or
            # it is in a slot that the processor has not been given yet.
            vcpu.refusal, vcpu.refused_fetch = _RETRY, None
            return None
        return answer

    def _fetch(self, linear: int, size: int) -> bytes | None:
        vcpu = self.arch
        vcpu.in_guest_mode = False
        vcpu.refresh_cpl()
        code = None
        # If it fails, the code has been taken away since it was translated.
        with contextlib.suppress(AccessFailed):
            code = read_guest_virt(vcpu, linear, size, fetch=True)
        vcpu.in_guest_mode = True
        # Whoever made a request saw us outside guest mode, and will not stop us.
        return None if vcpu.requests else code

    # -- registers ---------------------------------------------------------------------------------

    def get_regs(self) -> uapi.kvm_regs:
        """``KVM_GET_REGS``."""
        with self._ioctl("KVM_GET_REGS"):
            return uapi.kvm_regs(**self.arch.cpu.named_gprs())

    def set_regs(self, regs: uapi.kvm_regs) -> None:
        """``KVM_SET_REGS``; forgets a pending exception, as the kernel does."""
        with self._ioctl("KVM_SET_REGS"):
            self.arch.cpu.write_gprs({name: getattr(regs, name) for name in GPRS})
            self.arch.pending_exception = None
            self._devices.forget()

    def get_sregs(self) -> uapi.kvm_sregs:
        """``KVM_GET_SREGS``."""
        with self._ioctl("KVM_GET_SREGS"):
            return uapi.kvm_sregs.from_buffer_copy(self.arch.sync_sregs())

    def set_sregs(self, sregs: uapi.kvm_sregs) -> None:
        """``KVM_SET_SREGS``; EINVAL for a mode that cannot be (``kvm_is_valid_sregs``)."""
        if sregs.efer & EFER_LME and sregs.cr0 & CR0_PG:
            valid = sregs.cr4 & CR4_PAE and sregs.efer & EFER_LMA
        else:
            valid = not sregs.efer & EFER_LMA and not sregs.cs.l
        cr0 = sregs.cr0
        if cr0 >> 32 or (cr0 & CR0_NW and not cr0 & CR0_CD) or (cr0 & CR0_PG and not cr0 & CR0_PE):
            valid = False
        if not valid:
            raise KvmError(
                "KVM_SET_SREGS",
                errno.EINVAL,
                f"no such mode: cr0 {sregs.cr0:#x}, cr4 {sregs.cr4:#x}, efer {sregs.efer:#x},"
                f" cs.l {sregs.cs.l}",
            )
        with self._ioctl("KVM_SET_SREGS"):
            self.arch.sregs = uapi.kvm_sregs.from_buffer_copy(sregs)
            self.arch.sregs_changed = True

    def translate(self, gva: int) -> uapi.kvm_translation:
        """``KVM_TRANSLATE``."""
        vcpu = self.arch
        with self._ioctl("KVM_TRANSLATE"):
            vcpu_load(vcpu)
            try:
                if vcpu.sregs_changed:
                    vcpu.load_sregs()
                found = translate(vcpu, gva, AccessKind.READ, implicit=True)
            finally:
                vcpu_put()
        valid = type(found) is Translation
        gpa = found.gpa if type(found) is Translation else 2**64 - 1
        return uapi.kvm_translation(
            linear_address=gva, physical_address=gpa, valid=valid, writeable=1, usermode=0
        )

    def close(self) -> None:
        """Release the engine; the shared area keeps what it last held.  Again is harmless.

        A run in progress is kicked out first.
        """
        self.kick()
        with self._mutex:
            if not self._closed:
                self._closed = True
                self.arch.cpu.close()

    @contextlib.contextmanager
    def _ioctl(self, name: str) -> Iterator[None]:
        """One at a time, and none on a closed vCPU: :class:`KvmError` with EBADF."""
        with self._mutex:
            if self._closed:
                raise KvmError(name, errno.EBADF, f"vCPU {self.vcpu_id} is closed")
            yield


def _reset(s: uapi.kvm_sregs) -> None:
    """The state of a processor after reset (SDM volume 3, table 10-1)."""
    for name in ("es", "cs", "ss", "ds", "fs", "gs"):
        segment = getattr(s, name)
        segment.limit, segment.type, segment.s, segment.present = 0xFFFF, 3, 1, 1
    s.cs.selector, s.cs.base, s.cs.type = 0xF000, 0xFFFF0000, 11
    s.ldt.limit, s.ldt.type, s.ldt.present = 0xFFFF, 2, 1
    s.tr.limit, s.tr.type, s.tr.present = 0xFFFF, 11, 1
    s.gdt.limit = s.idt.limit = 0xFFFF
    s.cr0, s.apic_base = 0x60000010, 0xFEE00900
