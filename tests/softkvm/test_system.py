"""The software KVM's door: dialects, capabilities, and what is left behind."""

import pytest

from guestfault.dialect.interface import probe
from guestfault.dialect.published import DIALECTS
from guestfault.errors import Unavailable
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi

# What can be told by the numbers alone; to use another, one must ask for it by name.
RECOGNISED = {"seed", "v4", "v5", "linux-6.8", "linux-7.3"}
_SINCE_6_8 = {uapi.KVM_CAP_MEMORY_ATTRIBUTES, uapi.KVM_CAP_GUEST_MEMFD, uapi.KVM_CAP_VM_TYPES}
GUEST_MEMFD = {
    "linux-6.8": _SINCE_6_8,
    "linux-7.3": _SINCE_6_8 | {uapi.KVM_CAP_GUEST_MEMFD_FLAGS},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_each_dialect_announces_its_own_capabilities(name):
    system = SoftSystem(name)
    dialect = DIALECTS[name]
    assert name in system.name
    assert (probe(system.check_extension) == dialect.interface) == (name in RECOGNISED)
    own = {cap.number for cap in dialect.capabilities}
    found = {cap for cap in range(226, 250) if system.check_extension(cap)} - {231}
    assert found == (own | GUEST_MEMFD.get(name, set())) - {231}
    has = name in ("v5", "userfault-v3", *GUEST_MEMFD)
    assert system.check_extension(uapi.KVM_CAP_USER_MEMORY2) == has
    for cap in (uapi.KVM_CAP_USER_MEMORY, uapi.KVM_CAP_SYNC_MMU, uapi.KVM_CAP_IMMEDIATE_EXIT):
        assert system.check_extension(cap) == 1
    assert system.check_extension(100_000) == 0
    system.close()
    system.close()


def test_a_dialect_that_is_not_known():
    with pytest.raises(Unavailable, match="seed") as caught:
        SoftSystem("v99")
    assert "v99" in caught.value.what
