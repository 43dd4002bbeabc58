import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.guest.walk import (
    HASH_MULTIPLIER,
    LCG_INCREMENT,
    LCG_MULTIPLIER,
    Order,
    Walk,
    initial_hash,
)


@given(st.sampled_from(Order), st.integers(0, 12))
def test_the_step_is_one_cycle_over_any_power_of_two(order, bits):
    multiplier, increment = order.step
    seen, index = set(), 0
    while index not in seen:
        seen.add(index)
        index = (index * multiplier + increment) % (1 << bits)
    assert index == 0
    assert len(seen) == 1 << bits


def test_the_constants_suit_any_power_of_two_and_a_signed_immediate():
    assert LCG_MULTIPLIER % 4 == 1
    assert LCG_INCREMENT % 2 == HASH_MULTIPLIER % 2 == 1
    assert max(LCG_MULTIPLIER, LCG_INCREMENT, HASH_MULTIPLIER) < 1 << 31


@pytest.mark.parametrize("walk", Walk)
def test_only_the_first_visits_store_first(walk):
    assert not any(phase.store_first for phase in walk.phases[1:])
    assert walk.phases[0].store_first == (walk is Walk.WRITE_HEAVY)


@pytest.mark.parametrize("word_bits", [32, 64])
def test_vcpus_start_from_different_hashes(word_bits):
    hashes = {initial_hash(vcpu, word_bits) for vcpu in range(256)}
    assert len(hashes) == 256
    assert max(hashes) < 1 << word_bits
