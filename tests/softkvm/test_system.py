"""The software KVM's door: dialects, capabilities, and what is left behind."""

import pytest

from guestfault.dialect.interface import probe
from guestfault.dialect.published import DIALECTS
from guestfault.errors import Unavailable
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi


@pytest.mark.parametrize("name", DIALECTS)
def test_each_dialect_is_found_by_its_own_capability(name):
    system = SoftSystem(name)
    assert name in system.name
    assert probe(system.check_extension) == DIALECTS[name].interface
    for cap in (uapi.KVM_CAP_USER_MEMORY, uapi.KVM_CAP_SYNC_MMU, uapi.KVM_CAP_IMMEDIATE_EXIT):
        assert system.check_extension(cap) == 1
    assert system.check_extension(100_000) == 0
    system.close()
    system.close()


def test_a_dialect_that_is_not_known():
    with pytest.raises(Unavailable, match="seed") as caught:
        SoftSystem("v99")
    assert "v99" in caught.value.what
