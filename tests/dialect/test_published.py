"""Each record against the facts of its version, written down here once more and independently.

The facts are those of the patches (the Message-IDs are in the records): numbers as they stand in
the patches' ``kvm.h``.
"""

import dataclasses
import errno

import pytest

from guestfault.dialect.interface import EHWPOISON, probe
from guestfault.dialect.published import DIALECTS, dialect_named, recognise
from guestfault.dialect.record import NO_COUNTERPART, Ask, Dialect, Enabling, Guard, Reset, Site
from guestfault.errors import Unavailable
from guestfault.uapi import kvm as uapi

EFAULT = errno.EFAULT

# name: info cap, missing cap, (how, value) to ask, exit, errnos, third field
FACTS = {
    "v1": (None, 226, (Ask.VM_SWITCH, 0xC001AED2), 38, {EFAULT}, "size"),
    "wip-v2": (227, 228, (Ask.SLOT_FLAG, 4), 38, {errno.EPERM}, "len"),
    "seed": (227, 228, (Ask.SLOT_FLAG, 4), 38, {EFAULT}, "len"),
    "v3": (227, 228, (Ask.SLOT_FLAG, 4), 38, {EFAULT}, "len"),
    "v4": (228, 229, (Ask.SLOT_FLAG, 4), 38, {EFAULT}, "len"),
    "v5": (230, 231, (Ask.SLOT_FLAG, 4), None, {EFAULT}, "len"),
    "v6": (232, 236, (Ask.SLOT_FLAG, 8), 39, {EFAULT, EHWPOISON}, "size"),
    "v7": (232, 236, (Ask.SLOT_FLAG, 8), 39, {EFAULT, EHWPOISON}, "size"),
    "linux-6.8": (232, None, None, 39, {EFAULT, EHWPOISON}, "size"),
    "linux-7.3": (232, None, None, 39, {EFAULT, EHWPOISON}, "size"),
    "userfault-v3": (232, 243, (Ask.BITMAP, 8), 39, {EFAULT, EHWPOISON}, "size"),
}

ENABLING = dict.fromkeys(FACTS, Enabling.INFORMATIONAL) | {
    "wip-v2": Enabling.OPT_IN_PER_REASON,
    "v3": Enabling.OPT_IN,
}

GUARDS = dict.fromkeys(FACTS, ()) | {
    "seed": (Guard.LOADED_VCPU,),
    "v3": (Guard.LOADED_VCPU, Guard.EXIT_REASON_UNKNOWN),
    "v4": (Guard.VCPU_NOT_NULL, Guard.LOADED_VCPU, Guard.EXIT_REASON_UNKNOWN),
    "v5": (Guard.LOADED_VCPU, Guard.CANARY),
}

RESET = dict.fromkeys(FACTS, Reset.BEFORE_LOOP) | {
    "v1": Reset.NEVER,
    "wip-v2": Reset.NEVER,
    "v3": Reset.AT_ENTRY,
    "v5": Reset.NEVER,
}

# unknown, missing, read, write, exec, private, userfault
FLAGS = {
    "v1": (0, 0, 0, 0, 0, 0, 0),
    "wip-v2": (1, 2, 0, 0, 0, 0, 0),
    "seed": (1, 2, 0, 0, 0, 0, 0),
    "v3": (0, 0, 0, 0, 0, 0, 0),
    "v4": (0, 0, 0, 1, 2, 0, 0),
    "v5": (0, 0, 1, 2, 4, 0, 0),
    "v6": (0, 0, 1, 2, 4, 8, 0),
    "v7": (0, 0, 1, 2, 4, 8, 0),
    "linux-6.8": (0, 0, 0, 0, 0, 8, 0),
    "linux-7.3": (0, 0, 0, 0, 0, 8, 0),
    "userfault-v3": (0, 0, 0, 0, 0, 8, 16),
}

NAMES = {
    "v1": ("KVM_CAP_MEM_FAULT_NOWAIT", "KVM_SET_MEM_FAULT_NOWAIT"),
    "wip-v2": ("KVM_CAP_MEMORY_FAULT_NOWAIT", "KVM_MEM_ABSENT_MAPPING_FAULT"),
    "seed": ("KVM_CAP_MEMORY_FAULT_NOWAIT", "KVM_MEM_ABSENT_MAPPING_FAULT"),
    "v3": ("KVM_CAP_ABSENT_MAPPING_FAULT", "KVM_MEM_ABSENT_MAPPING_FAULT"),
    "v4": ("KVM_CAP_NOWAIT_ON_FAULT", "KVM_MEM_NOWAIT_ON_FAULT"),
    "v5": ("KVM_CAP_USERFAULT_ON_MISSING", "KVM_MEM_USERFAULT_ON_MISSING"),
    "v6": ("KVM_CAP_EXIT_ON_MISSING", "KVM_MEM_EXIT_ON_MISSING"),
    "v7": ("KVM_CAP_EXIT_ON_MISSING", "KVM_MEM_EXIT_ON_MISSING"),
    "userfault-v3": ("KVM_CAP_USERFAULT", "KVM_MEM_USERFAULT"),
}

every = pytest.mark.parametrize("name", DIALECTS)


def test_the_versions_in_their_order():
    assert list(DIALECTS) == list(FACTS)


@every
def test_numbers(name):
    d = DIALECTS[name]
    info, missing, ask, exit_reason, errnos, third = FACTS[name]
    assert (d.info.number if d.info else None) == info
    assert (d.missing.cap.number if d.missing else None) == missing
    assert ((d.missing.ask, d.missing.value) if d.missing else None) == ask
    assert (d.interface.exit_reason, d.interface.errnos) == (exit_reason, errnos)
    assert d.interface.length_name == third
    assert d.interface.cap == (info or missing)
    assert d.info is None or d.info.enabling is ENABLING[name]
    if d.missing is not None:
        assert (d.missing.cap.name, d.missing.name) == NAMES[name]
        assert d.missing.cap.enabling is Enabling.INFORMATIONAL


@every
def test_guards_and_reset(name):
    d = DIALECTS[name]
    assert (d.guards, d.reset) == (GUARDS[name], RESET[name])
    assert d.warns_only == (frozenset({Guard.CANARY}) if name == "v5" else frozenset())


@every
def test_flag_bits_are_those_that_userspace_decodes(name):
    d = DIALECTS[name]
    bits = (
        d.flag_unknown,
        d.flag_missing,
        d.flag_read,
        d.flag_write,
        d.flag_exec,
        d.flag_private,
        d.flag_userfault,
    )
    assert bits == FLAGS[name]
    assert sorted(filter(None, bits)) == sorted(d.interface.flags.values())


@every
def test_what_the_helper_returns_is_what_userspace_takes_for_the_exit(name):
    d = DIALECTS[name]
    assert d.fill_errno in d.interface.errnos
    assert (d.fill_errno == EFAULT) == (name != "wip-v2")


def test_published_bugs_are_data():
    assert DIALECTS["wip-v2"].sizes_in_pages == {Site.DIRECT_MAP, Site.FETCH}
    assert not DIALECTS["wip-v2"].checks_reasons
    assert not DIALECTS["v1"].interface.flags_written
    for name, d in DIALECTS.items():
        if name != "wip-v2":
            assert d.checks_reasons
            assert not d.sizes_in_pages
        if name != "v1":
            assert d.interface.flags_written
            assert not d.annotates_only_missing
        assert d.readonly_excluded == (name == "v7")
        assert d.fast_gup_reads == (name in FACTS and list(FACTS).index(name) <= 6)


def test_annotated_sites():
    error_pfn = {name for name, d in DIALECTS.items() if Site.HANDLE_ERROR_PFN in d.annotated}
    assert error_pfn == {"wip-v2", "seed", "v3", "v4", "v5", "v6", "v7"}
    own_accesses = {n for n, d in DIALECTS.items() if Site.VCPU_READ_GUEST_PAGE in d.annotated}
    assert own_accesses == {"v3", "v4", "v5"}
    assert DIALECTS["v1"].annotated == {Site.FAULTIN_PFN}
    assert Site.VCPU_MAP in DIALECTS["v3"].annotated
    assert Site.DO_USERFAULT in DIALECTS["userfault-v3"].annotated
    assert DIALECTS["seed"].annotated == DIALECTS["wip-v2"].annotated
    assert DIALECTS["linux-6.8"].annotated < DIALECTS["linux-7.3"].annotated
    assert len(DIALECTS["v3"].annotated & NO_COUNTERPART) == 4


@every
def test_every_record_says_where_it_and_its_flaws_can_be_read(name):
    d = DIALECTS[name]
    assert d.changed
    assert d.title
    assert d.published
    assert d.flaws
    for source in (d.source, *(flaw.source for flaw in d.flaws)):
        assert "@" in source or source.startswith(("Linux ", "Documentation/"))
        assert not any(c.isspace() for c in source if "@" in source)


@every
def test_a_record_is_frozen_and_can_be_changed_in_a_copy(name):
    d = DIALECTS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        d.guards = ()
    assert dataclasses.replace(d, guards=()).guards == ()


def test_merged_numbers_are_the_headers_own():
    d = DIALECTS["linux-7.3"]
    assert d.interface.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT
    assert d.interface.cap == uapi.KVM_CAP_MEMORY_FAULT_INFO
    assert d.flag_private == uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE


def announced_by(d: Dialect):
    numbers = {cap.number for cap in d.capabilities}
    return lambda cap: int(cap in numbers)


@every
def test_a_dialect_is_recognised_where_its_numbers_tell_and_no_other_is(name):
    """Who must be asked, and who is read like the merged one, is not: see ``probe``."""
    d = DIALECTS[name]
    found = recognise(announced_by(d))
    if name in ("seed", "v4", "v5", "linux-6.8"):
        assert found is d
    elif name in ("wip-v2", "v3"):
        assert found is DIALECTS["seed"]  # whose exits they never make unasked
        assert d.must_be_enabled
        assert not found.must_be_enabled
    elif name == "v1":
        assert found is None
        assert d.must_be_enabled
    else:
        assert found is DIALECTS["linux-6.8"]
        # Nothing is misread: the same combination, the same payload.
        assert found.interface.exit_reason == d.interface.exit_reason
        assert found.interface.errnos == d.interface.errnos
    assert (found.interface if found else None) is probe(announced_by(d))


def test_by_name():
    assert dialect_named("v3") is DIALECTS["v3"]
    with pytest.raises(Unavailable, match=r"dialect 'v8': not known; known are v1, wip-v2, .*-v3"):
        dialect_named("v8")
