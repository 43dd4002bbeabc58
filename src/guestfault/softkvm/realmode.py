"""Events in real mode on a processor that does not deliver them: ``emulate_int_real`` (emulate.c).

VMX without *unrestricted guest* runs real-mode code in virtual-8086 mode, and cannot interrupt it
as real mode would.  So KVM's emulator pushes the frame and reads the vector
(``kvm_inject_realmode_interrupt``), with KVM's own copies.  A push that fails is an access to a
device, as always (:mod:`guestfault.softkvm.emulated_access`): an exit is prepared, and since no
instruction is under way, nobody ever makes it.  The frame is lost, and the guest goes on in its
handler.  A vector that cannot be read is the triple fault.

This is how mmio_warning_test of the kernel's selftests met v5's canary (the kernel test robot,
202309141107.30863e9d-oliver.sang@intel.com): three pushes, each of them a failed copy and annotated
as one, in a KVM_RUN that returns 0.
"""

from __future__ import annotations

from guestfault.softkvm.em_stack import em_push
from guestfault.softkvm.emulate_ctxt import X86Emul
from guestfault.softkvm.emulator import init_emulate_ctxt
from guestfault.softkvm.guest_access import kvm_read_guest_virt_helper
from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_make_request
from guestfault.x86.registers import X86_EFLAGS_AC, X86_EFLAGS_IF, X86_EFLAGS_TF
from guestfault.x86.segments import Segment

__all__ = ["em_int", "kvm_inject_realmode_interrupt"]

_CONTINUE, _PROPAGATE_FAULT = X86Emul.CONTINUE, X86Emul.PROPAGATE_FAULT


def kvm_inject_realmode_interrupt(vcpu: KvmVcpu, vector: int, inc_eip: int) -> None:
    """Deliver an exception or an interrupt; ``inc_eip`` is the length of an INT n."""
    init_emulate_ctxt(vcpu, None)
    ctxt = vcpu.emulate_ctxt
    rc = _emulate_int_real(vcpu, vector, (ctxt.eip + inc_eip) & 0xFFFF)
    if rc is not _CONTINUE:
        kvm_make_request(vcpu, Request.TRIPLE_FAULT)
        return
    vcpu.cpu.write_gprs(ctxt.writeback)


def em_int(vcpu: KvmVcpu, vector: int) -> X86Emul:
    """INT n, as an instruction that KVM carries out."""
    ctxt = vcpu.emulate_ctxt
    assert ctxt.insn is not None
    return _emulate_int_real(vcpu, vector, (ctxt.eip + ctxt.insn.len) & 0xFFFF)


def _emulate_int_real(vcpu: KvmVcpu, vector: int, return_ip: int) -> X86Emul:
    ctxt, regs, sregs = vcpu.emulate_ctxt, vcpu.cpu.named_gprs(), vcpu.sync_sregs()
    ss, rsp, rflags = Segment.from_kvm(sregs.ss), regs["rsp"], regs["rflags"]
    for value in (rflags, sregs.cs.selector, return_ip):
        rc, rsp = em_push(vcpu, ss, rsp, value, 2)
        if rc is not _CONTINUE:
            return rc
    words = []
    for offset in (2, 0):  # CS, then IP
        at = sregs.idt.base + 4 * vector + offset
        found = kvm_read_guest_virt_helper(vcpu, at, 2, system=True)
        if not isinstance(found, bytes):
            ctxt.exception = found
            return X86Emul.IO_NEEDED if found is None else _PROPAGATE_FAULT
        words.append(int.from_bytes(found, "little"))
    cs, ip = words
    sregs.cs.selector, sregs.cs.base = cs, cs << 4
    vcpu.load_sregs()
    flags = rflags & ~(X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC)
    ctxt.writeback.update(rsp=rsp, rip=ip, rflags=flags)
    return _CONTINUE
