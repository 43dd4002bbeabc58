"""The vCPU as userspace holds it: the ioctls of a vCPU file descriptor, in software."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterable, Iterator, Mapping
from signal import Signals

from guestfault.dialect.unmerged import kvm_run_v5
from guestfault.errors import KvmError
from guestfault.softkvm import preempt
from guestfault.softkvm.async_pf import kvm_clear_async_pf_completion_queue
from guestfault.softkvm.cpu import Cpu
from guestfault.softkvm.guest_mmu import read_guest_virt, tlb_fill
from guestfault.softkvm.kvm_host import (
    Kvm,
    KvmVcpu,
    Request,
    kvm_make_request,
    kvm_vcpu_kick,
    vcpu_load,
    vcpu_put,
)
from guestfault.softkvm.lapic import APIC_BASE_BSP, KvmLapic
from guestfault.softkvm.mmu import private_direct_page_fault
from guestfault.softkvm.msr import read_msr, write_msr
from guestfault.softkvm.paging_tmpl import gva_to_gpa
from guestfault.softkvm.preempt import Mutex, preemption_point
from guestfault.softkvm.processor import GPRS, Access, Hooks
from guestfault.softkvm.refusal import AccessFailed, Retry
from guestfault.softkvm.shadow_fault import kvm_mmu_create
from guestfault.softkvm.srcu import kvm_vcpu_srcu_read_lock, kvm_vcpu_srcu_read_unlock
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
        self._kick_lock = threading.RLock()  # a signal handler may kick in the midst of run()
        self._kicked = False
        self._closed = False
        self.arch = KvmVcpu(kvm, vcpu_id, kvm_run_v5.from_buffer(area), self._view)
        self.arch.sregs = uapi.kvm_sregs.from_buffer_copy(_RESET)
        self._mutex = Mutex(self.arch.shared)  # vcpu->mutex: one ioctl at a time
        if not kvm.tdp_enabled:
            kvm_mmu_create(self.arch)
        elif kvm.has_private_mem:
            self.arch.mmu_page_fault = private_direct_page_fault
        self.arch.cpu = (kvm.make_processor or Cpu)(Hooks(self._on_tlb_miss, self._fetch))
        self.arch.cpu.write_gprs({"rip": 0xFFF0, "rflags": 2, "rdx": 0x600})
        if kvm.irqchip_in_kernel:
            self._create_lapic()

    def _create_lapic(self) -> None:
        vcpu = self.arch
        vcpu.apic = KvmLapic(vcpu.vcpu_id)
        if vcpu.vcpu_id != 0:
            # An application processor, which waits for INIT and SIPI.
            vcpu.sregs.apic_base &= ~APIC_BASE_BSP
            vcpu.mp_state = uapi.KVM_MP_STATE_UNINITIALIZED
        vcpu.apic.apic_base = int(vcpu.sregs.apic_base)

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
            vcpu.srcu_seq |= 1  # kvm_vcpu_srcu_read_lock(), behind the same point as the mutex
            vcpu.in_run = True  # before the next: a kick is seen here, or by a request
            vcpu.wants_to_run = not vcpu.run.immediate_exit
            try:
                ret = kvm_arch_vcpu_ioctl_run(vcpu)
            finally:
                if preempt.scheduler is not None:
                    preemption_point("kvm_arch_vcpu_ioctl_run: leave", vcpu.shared, True)
                vcpu.srcu_seq += vcpu.srcu_seq & 1  # kvm_vcpu_srcu_read_unlock()
                vcpu.in_run = False
                if self._kicked:  # set before in_run is read: none is overlooked
                    self._end_kick(ret)
                vcpu_put()
        return ret

    def kick(self) -> None:
        """Make :meth:`run` return -EINTR: see :meth:`guestfault.kvm.protocols.Vcpu.kick`."""
        vcpu = self.arch
        preemption_point("kick: is the vCPU in KVM_RUN", vcpu.shared, True)
        with self._kick_lock:  # which must not be held where a point is
            self._kicked = True
            vcpu.run.immediate_exit = 1
            if not vcpu.in_run:
                return
            vcpu.requests.add(Request.SIGNAL)
        kvm_vcpu_kick(vcpu)

    def set_interrupting_signals(self, signals: Iterable[Signals]) -> None:
        """Nothing to set: SIGBUS ends the :meth:`run` it is sent in, and no other signal does."""

    def _end_kick(self, ret: int) -> None:
        """KVM_RUN has ended, with this result: a kick holds until one ends with -EINTR."""
        with self._kick_lock:
            self.arch.requests.discard(Request.SIGNAL)
            if ret == -errno.EINTR:
                self._kicked = False
                self.arch.run.immediate_exit = 0

    # -- the processor's questions: KVM answers outside guest mode ---------------------------------

    def _on_tlb_miss(self, gva: int, access: int) -> tuple[int, int] | None:
        vcpu = self.arch  # a modelled processor has just come to a point that names vcpu.shared
        vcpu.in_guest_mode = False
        vcpu.srcu_seq |= 1
        vcpu.cpl = vcpu.cpu.read_cs() & 3 if vcpu.protected else 0  # refresh_cpl()
        vcpu.refused_page = None
        answer = tlb_fill(vcpu, gva, access)
        if preempt.scheduler is not None:
            preemption_point("vcpu_enter_guest: enter after a TLB miss", vcpu.shared, True)
        vcpu.srcu_seq += 1
        vcpu.in_guest_mode = True
        if answer is None:
            vcpu.refused_fetch = gva if access == _FETCH else None
        elif vcpu.requests or vcpu.slots_changed():
            # The answer may be stale, for whoever made the request saw us outside guest mode, or
            # it is in a slot that the processor has not been given yet.
            vcpu.refusal, vcpu.refused_fetch = _RETRY, None
            return None
        return answer

    def _fetch(self, linear: int, size: int) -> bytes | None:
        vcpu = self.arch
        vcpu.in_guest_mode = False
        vcpu.srcu_seq |= 1
        vcpu.refresh_cpl()
        code = None
        # If it fails, the code has been taken away since it was translated.
        with contextlib.suppress(AccessFailed):
            code = read_guest_virt(vcpu, linear, size, fetch=True)
        preemption_point("vcpu_enter_guest: enter after a fetch", vcpu.shared, True)
        vcpu.srcu_seq += 1
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

    def get_sregs(self) -> uapi.kvm_sregs:
        """``KVM_GET_SREGS``."""
        with self._ioctl("KVM_GET_SREGS"):
            sregs = uapi.kvm_sregs.from_buffer_copy(self.arch.sync_sregs())
            vector = self.arch.interrupt_injected
            if vector is not None:
                sregs.interrupt_bitmap[vector // 64] |= 1 << vector % 64
            return sregs

    def set_sregs(self, sregs: uapi.kvm_sregs) -> None:
        """``KVM_SET_SREGS``; EINVAL for a mode that cannot be (``kvm_is_valid_sregs``)."""
        cr0, efer = sregs.cr0, sregs.efer
        if efer & EFER_LME and cr0 & CR0_PG:
            valid = sregs.cr4 & CR4_PAE and efer & EFER_LMA
        else:
            valid = not efer & EFER_LMA and not sregs.cs.l
        if cr0 >> 32 or (cr0 & CR0_NW and not cr0 & CR0_CD) or (cr0 & CR0_PG and not cr0 & CR0_PE):
            valid = False
        if not valid:
            raise KvmError(
                "KVM_SET_SREGS",
                errno.EINVAL,
                f"no such mode: cr0 {sregs.cr0:#x}, cr4 {sregs.cr4:#x}, efer {sregs.efer:#x},"
                f" cs.l {sregs.cs.l}",
            )
        with self._mutex:
            self._check_open("KVM_SET_SREGS")
            vcpu = self.arch
            vcpu.sregs = uapi.kvm_sregs.from_buffer_copy(sregs)
            vcpu.sregs_changed = True
            bitmap = int.from_bytes(bytes(sregs.interrupt_bitmap), "little")
            if bitmap:  # which has one bit: an interrupt that was on its way to the guest
                vcpu.interrupt_injected = (bitmap & -bitmap).bit_length() - 1
                vcpu.sregs.interrupt_bitmap[:] = [0] * len(sregs.interrupt_bitmap)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """``KVM_GET_MSRS``."""
        with self._loaded("KVM_GET_MSRS") as vcpu:
            values = {}
            for index in indices:
                value = read_msr(vcpu, index)
                if value is None:
                    raise KvmError("KVM_GET_MSRS", errno.EINVAL, f"MSR {index:#x}")
                values[index] = value
            return values

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """``KVM_SET_MSRS``."""
        with self._loaded("KVM_SET_MSRS") as vcpu:
            for index, value in values.items():
                if not write_msr(vcpu, index, value, host_initiated=True):
                    raise KvmError("KVM_SET_MSRS", errno.EINVAL, f"MSR {index:#x} = {value:#x}")

    def get_mp_state(self) -> int:
        """``KVM_GET_MP_STATE``."""
        with self._ioctl("KVM_GET_MP_STATE"):
            return self.arch.mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """``KVM_SET_MP_STATE``."""
        only_with_lapic = uapi.KVM_MP_STATE_UNINITIALIZED, uapi.KVM_MP_STATE_HALTED
        with self._ioctl("KVM_SET_MP_STATE"):
            vcpu = self.arch
            if mp_state != uapi.KVM_MP_STATE_RUNNABLE and (
                vcpu.apic is None or mp_state not in only_with_lapic
            ):
                raise KvmError("KVM_SET_MP_STATE", errno.EINVAL, f"state {mp_state}")
            vcpu.mp_state = mp_state
            kvm_make_request(vcpu, Request.EVENT)

    def translate(self, gva: int) -> uapi.kvm_translation:
        """``KVM_TRANSLATE``: KVM's own walk, which makes no page fault and leaves no flag set."""
        with self._loaded("KVM_TRANSLATE") as vcpu:
            found = gva_to_gpa(vcpu, gva, AccessKind.READ, False, implicit=True)
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
                kvm_clear_async_pf_completion_queue(self.arch)
                self.arch.cpu.close()

    @contextlib.contextmanager
    def _ioctl(self, name: str) -> Iterator[None]:
        """One at a time, and none on a closed vCPU: :class:`KvmError` with EBADF."""
        with self._mutex:
            self._check_open(name)
            yield

    def _check_open(self, name: str) -> None:
        if self._closed:
            raise KvmError(name, errno.EBADF, f"vCPU {self.vcpu_id} is closed")

    @contextlib.contextmanager
    def _loaded(self, name: str) -> Iterator[KvmVcpu]:
        """Like :meth:`_ioctl`, with the vCPU loaded: for one that accesses guest memory."""
        with self._ioctl(name):
            vcpu = self.arch
            vcpu_load(vcpu)
            kvm_vcpu_srcu_read_lock(vcpu)
            try:
                if vcpu.sregs_changed:
                    vcpu.load_sregs()
                yield vcpu
            finally:
                kvm_vcpu_srcu_read_unlock(vcpu)
                vcpu_put()


def _reset() -> uapi.kvm_sregs:
    """The state of a processor after reset (SDM volume 3, table 10-1)."""
    s = uapi.kvm_sregs()
    for name in ("es", "cs", "ss", "ds", "fs", "gs"):
        segment = getattr(s, name)
        segment.limit, segment.type, segment.s, segment.present = 0xFFFF, 3, 1, 1
    s.cs.selector, s.cs.base, s.cs.type = 0xF000, 0xFFFF0000, 11
    s.ldt.limit, s.ldt.type, s.ldt.present = 0xFFFF, 2, 1
    s.tr.limit, s.tr.type, s.tr.present = 0xFFFF, 11, 1
    s.gdt.limit = s.idt.limit = 0xFFFF
    s.cr0, s.apic_base = 0x60000010, 0xFEE00900
    return s


_RESET = _reset()
