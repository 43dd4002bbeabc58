"""How an exception is raised, and how two combine."""

import pytest

from guestfault.softkvm.exception_queue import from_intercept, kvm_queue_exception
from guestfault.softkvm.kvm_host import Request, kvm_test_request
from guestfault.softkvm.refusal import GuestException
from guestfault.x86.registers import DE_VECTOR, DF_VECTOR, GP_VECTOR, PF_VECTOR, UD_VECTOR


def test_an_error_code_of_zero_where_there_is_one():
    assert from_intercept(GP_VECTOR) == GuestException(GP_VECTOR, 0)
    assert from_intercept(UD_VECTOR) == GuestException(UD_VECTOR, None)


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (DE_VECTOR, GP_VECTOR, DF_VECTOR),
        (PF_VECTOR, PF_VECTOR, DF_VECTOR),
        (PF_VECTOR, GP_VECTOR, DF_VECTOR),
        (GP_VECTOR, PF_VECTOR, PF_VECTOR),
        (UD_VECTOR, GP_VECTOR, GP_VECTOR),
        (DF_VECTOR, GP_VECTOR, None),
        (DF_VECTOR, PF_VECTOR, None),
    ],
)
def test_how_two_combine(soft, first, second, result):
    """SDM volume 3, table 6-5; ``None`` is the shutdown."""
    vcpu = soft().vcpu.arch
    vcpu.pending_exception = from_intercept(first)
    assert kvm_queue_exception(vcpu, GuestException(second, 0)) == 1
    if result is None:
        assert kvm_test_request(vcpu, Request.TRIPLE_FAULT)
        assert vcpu.pending_exception is None
    else:
        assert not vcpu.requests
        assert vcpu.pending_exception.vector == result
