"""From evidence to causes, in the order in which the kernel comes upon them.

KVM looks for the slot first, then at who holds the page (a guest_memfd or a mapping), then at the
slot's rights (``virt/kvm/kvm_main.c``, ``virt/kvm/guest_memfd.c``).  What is left is
``get_user_pages``: the mapping, its rights, the page table entry (``mm/gup.c``), and for a page
that is not there the fault itself, which :mod:`guestfault.fault.cause.absent` follows.  What comes
first there comes first here: the first cause is the one that made the access fail, and those after
it would be met next.

Nothing is guessed.  Where the evidence leaves two explanations, most often because nobody knows
whether the access was a write, both are named and neither is ``certain``.
"""

from __future__ import annotations

from dataclasses import replace

from guestfault.dialect.interface import EHWPOISON
from guestfault.fault.access import AccessKind
from guestfault.fault.cause.absent import judge_absent
from guestfault.fault.cause.evidence import Evidence
from guestfault.fault.cause.record import Cause, Kind, Remedy
from guestfault.fault.outcome import BareFault, MemoryFault
from guestfault.linux.vma import Vma
from guestfault.uapi import kvm as uapi

__all__ = ["describe", "judge"]

_LIFTED = (Kind.PRESENT, Kind.NOT_MAPPED_IN, Kind.UNKNOWN)


def judge(evidence: Evidence) -> tuple[Cause, ...]:
    """The causes that the evidence allows, the likeliest first; there is always one."""
    if evidence.kind is not None:
        return _judge(evidence)
    # Nobody said what the access does: it is a fetch or read, or a write.
    as_read = _judge(replace(evidence, kind=AccessKind.READ))
    as_write = _judge(replace(evidence, kind=AccessKind.WRITE))
    if as_read[0].kind is as_write[0].kind:
        return as_write
    # What an access of one sort could have had without trouble did not fail for that.
    both = (*as_read, *(cause for cause in as_write if cause not in as_read))
    ranked = sorted(both, key=lambda cause: cause.kind in _LIFTED)
    return tuple(replace(cause, certain=False) for cause in ranked)


def _judge(evidence: Evidence) -> tuple[Cause, ...]:
    slot, vma = evidence.slot, evidence.vma
    if evidence.hva is None:
        return (_nowhere(evidence),)
    if evidence.poisoned:
        return (_broken(evidence),)
    private = _guest_memfd(evidence)
    if private:
        return private
    is_write = evidence.kind is AccessKind.WRITE
    if is_write and slot is not None and slot.flags & uapi.KVM_MEM_READONLY:
        return (
            Cause(
                Kind.READ_ONLY_SLOT,
                f"{slot} has KVM_MEM_READONLY, and the access is a write",
                Remedy.ADD_SLOT,
                "serve the write as a device would, or delete the slot and set it again without "
                "the flag, which cannot be changed in place",
            ),
        )
    if vma is None:
        return (
            Cause(
                Kind.NO_MAPPING,
                f"nothing is mapped at {evidence.hva:#x}",
                Remedy.MAP,
                "map memory there (MAP_FIXED_NOREPLACE); what was there is lost unless a file "
                "holds it",
            ),
        )
    refused = _refused(evidence, vma, is_write)
    if refused:
        return (refused,)
    page = evidence.page
    if page.present or (page.swapped and not page.uffd_wp):
        if is_write and page.uffd_wp:
            return (_write_protected(evidence, vma),)
        where = "is mapped in" if page.present else "is in swap or on its way back from there"
        return (
            Cause(
                Kind.PRESENT,
                f"the page at {evidence.hva:#x} {where} and the access allowed: what kept it away "
                "has passed",
                Remedy.RETRY,
                "run the vCPU again, with a guard against the same fault for ever",
                # Shared memory is not swapped from a page table: that is a page on its way, or a
                # poison marker that an unprivileged look cannot tell from it.
                certain=page.present or not vma.shared,
            ),
        )
    found = judge_absent(evidence, vma)
    protected = page.uffd_wp and is_write
    uffd = (Kind.PAST_END_OF_FILE, Kind.UFFD_MINOR, Kind.UFFD_MISSING)
    if protected and found[0].kind not in uffd:
        # A marker holds the protection of a page that is out: once in, the write meets it.
        return (_write_protected(evidence, vma),)
    return found


def _nowhere(evidence: Evidence) -> Cause:
    if evidence.gpa is None:
        return Cause(Kind.UNKNOWN, "the access has no known address", Remedy.NONE, certain=False)
    sort = "private memory" if evidence.is_private else "memory"
    return Cause(
        Kind.NO_SLOT,
        f"no slot holds gpa {evidence.gpa:#x}: to KVM it is a device's and not {sort}",
        Remedy.ADD_SLOT,
        "set a slot over it, or serve it as a device",
    )


def _guest_memfd(evidence: Evidence) -> tuple[Cause, ...]:
    """Causes that come before any host mapping; none if no guest_memfd is to serve it."""
    slot, failure = evidence.slot, evidence.failure
    if slot is None or not isinstance(failure, MemoryFault) or failure.errno == EHWPOISON:
        return ()
    asked = "private" if evidence.is_private else "shared"
    if not slot.flags & uapi.KVM_MEM_GUEST_MEMFD:
        if not evidence.is_private:
            return ()
        return (
            Cause(
                Kind.NO_GUEST_MEMFD,
                f"the access is to private memory and {slot} has no guest_memfd",
                Remedy.ADD_GUEST_MEMFD,
                "delete the slot and set it again with KVM_MEM_GUEST_MEMFD",
            ),
        )
    other = "shared" if evidence.is_private else "private"
    at = f"gpa {evidence.gpa:#x}" if evidence.gpa is not None else f"hva {evidence.hva:#x}"
    mismatch = Cause(
        Kind.PRIVATE_MISMATCH,
        f"the guest accesses {at} as {asked} memory, and its attributes say {other}",
        Remedy.CONVERT,
        f"make the page {asked}, as the guest asks; if its attributes were changing just then, run "
        "the vCPU again and leave them: the exit tells what they were before",
    )
    gone = Cause(
        Kind.GUEST_MEMFD_GONE,
        f"the guest_memfd behind {slot} is closed or no longer bound to it",
        Remedy.NONE,
        "its content went with it; a new guest_memfd in a new slot starts from zeros",
    )
    if evidence.attributes is None:
        return (replace(mismatch, certain=False), replace(gone, certain=False))
    is_private = bool(evidence.attributes & uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE)
    return (mismatch,) if is_private != evidence.is_private else (gone,)


def _refused(evidence: Evidence, vma: Vma, is_write: bool) -> Cause | None:
    """What the mapping as a whole, or a marker in place of the page, refuses."""
    flags, failure = evidence.flags, evidence.failure
    poisoned = isinstance(failure, MemoryFault | BareFault) and failure.errno == EHWPOISON
    if poisoned or evidence.page.poisoned:
        return _broken(evidence)
    if flags & {"pf", "io"}:
        writes = " without leave to write" if is_write and not vma.write else ""
        return Cause(
            Kind.DEVICE_MAPPING,
            f"{describe(vma)} is device memory (VM_PFNMAP or VM_IO){writes}, for which KVM takes "
            f"only an entry that its driver installs for a {'write' if is_write else 'read'}",
            Remedy.NONE,
            "the driver that made the mapping decides; use ordinary memory in the slot",
        )
    allowed = vma.write if is_write else vma.read
    if not allowed:
        held = (vma.read, vma.write, vma.execute)
        rights = "".join(c if on else "-" for c, on in zip("rwx", held, strict=True))
        right = "PROT_WRITE" if is_write else "PROT_READ"
        only_write = is_write and vma.read
        # Without VM_MAYWRITE (VM_MAYREAD) no mprotect may add the right.
        can = not flags or ("mw" if is_write else "mr") in flags
        return Cause(
            Kind.READ_ONLY_MAPPING if only_write else Kind.NO_ACCESS,
            f"{describe(vma)} has protection {rights}, and the access is a "
            f"{'write' if is_write else 'read'}",
            Remedy.PROTECT if can else Remedy.MAP,
            f"give the page {right}"
            if can
            else f"map it anew from a descriptor that may be used for {right}",
        )
    if evidence.page.guard:
        return Cause(
            Kind.GUARD_REGION,
            f"the page at {evidence.hva:#x} is a guard region in {describe(vma)}",
            Remedy.REMOVE_GUARD,
            "remove the guard",
        )
    return None


def _broken(evidence: Evidence) -> Cause:
    where = "" if evidence.vma is None else f" in {describe(evidence.vma)}"
    return Cause(
        Kind.HWPOISON,
        f"the page at {evidence.hva:#x}{where} is poisoned: broken memory, or declared so by "
        "UFFDIO_POISON",
        Remedy.NONE,
        "its content is lost; tell the guest by a machine check, or put a new page with content "
        "from elsewhere in its place",
    )


def _write_protected(evidence: Evidence, vma: Vma) -> Cause:
    return Cause(
        Kind.UFFD_WRITE_PROTECTED,
        f"userfaultfd write-protects the page at {evidence.hva:#x} in {describe(vma)}",
        Remedy.WRITE_UNPROTECT,
        "lift the protection (mode 0), after saving what must be saved",
    )


def describe(vma: Vma) -> str:
    """A mapping in few words: its range and what it is of."""
    of = f" of {vma.path}" if vma.path else ", anonymous" if not vma.inode else ""
    return f"the mapping {vma.start:#x}-{vma.end:#x}{of}"
