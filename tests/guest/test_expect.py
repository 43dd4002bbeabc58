import random
import time
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.guest.boot import initial_memory
from guestfault.guest.expect import expect, pages_visited
from guestfault.guest.layout import PAGE_SIZE, Layout, Mode
from guestfault.guest.walk import HASH_MULTIPLIER, Walk, initial_hash

EVERY_GUEST = st.tuples(st.sampled_from(Mode), st.sampled_from(Walk))


@given(EVERY_GUEST, st.integers(16, 600), st.integers(1, 11), st.data())
def test_each_phase_but_zipf_visits_every_page_as_often_as_it_has_passes(guest, pages, vcpus, data):
    mode, walk = guest
    layout = Layout(pages * PAGE_SIZE, mode, vcpus)
    vcpu = data.draw(st.integers(0, vcpus - 1))
    share = layout.share(vcpu)
    visits = pages_visited(layout, walk, vcpu)
    for number, phase in enumerate(walk.phases):
        part = list(islice(visits, phase.passes * len(share)))
        assert all(store_first == phase.store_first for _, store_first in part)
        if walk is Walk.ZIPF and number == 0:
            assert {page for page, _ in part} <= set(share)
        else:
            for at in range(0, len(part), len(share)):
                assert sorted(page for page, _ in part[at : at + len(share)]) == list(share)
    assert next(visits, None) is None


def test_sequential_goes_up_and_random_does_not():
    layout = Layout(64 * PAGE_SIZE, Mode.REAL)
    sequential, shuffled = (
        [page for page, _ in pages_visited(layout, walk, 0)]
        for walk in (Walk.SEQUENTIAL, Walk.RANDOM)
    )
    assert sequential == list(layout.data)
    steps = Counter(after - before for before, after in pairwise(shuffled))
    assert steps[1] < len(shuffled) / 4


def test_zipf_gives_each_octave_of_ranks_about_the_same_weight():
    layout = Layout(4096 * PAGE_SIZE, Mode.REAL)
    visits = islice(pages_visited(layout, Walk.ZIPF, 0), len(layout.data))
    counts = sorted(Counter(page for page, _ in visits).values(), reverse=True)
    share = sum(counts) / 12
    assert len(layout.data).bit_length() == 12
    for octave in range(6):  # further out a page is met too seldom for its rank to be told
        weight = sum(counts[(1 << octave) - 1 : (2 << octave) - 1])
        assert 0.8 * share < weight < 1.35 * share


@pytest.mark.parametrize(("mode", "bits"), [(Mode.LONG_CPL3, 64), (Mode.REAL, 32)])
def test_one_visit_worked_by_words(mode, bits):
    layout = Layout(16 * PAGE_SIZE, mode, vcpus=11 if mode.is_long else 15)
    memory = initial_memory(layout, Walk.SEQUENTIAL, seed=3)
    words = memoryview(memory).cast("Q" if bits == 64 else "I")
    per_page = PAGE_SIZE * 8 // bits
    (page,) = layout.share(1)

    h = initial_hash(1, bits)
    for number in (page, *range(layout.header_pages)):
        s = sum(words[number * per_page : (number + 1) * per_page])
        h = ((h ^ h >> bits // 2) * HASH_MULTIPLIER + s) % (1 << bits)
        if number == page:
            after = [word ^ h for word in words[page * per_page : (page + 1) * per_page]]

    result = expect(layout, Walk.SEQUENTIAL, memory)
    assert result.checksums[1] == h
    final = memoryview(result.memory).cast(words.format)
    assert list(final[page * per_page : (page + 1) * per_page]) == after


@given(EVERY_GUEST, st.integers(1, 5), st.data())
def test_a_wrong_byte_anywhere_changes_a_checksum(guest, vcpus, data):
    mode, walk = guest
    layout = Layout(18 * PAGE_SIZE, mode, vcpus)
    memory = bytearray(random.Random(4).randbytes(layout.memory_size))
    right = expect(layout, walk, memory).checksums
    at = data.draw(st.integers(0, layout.memory_size - 1))
    memory[at] ^= data.draw(st.integers(1, 255))
    wrong = expect(layout, walk, memory).checksums
    if at // PAGE_SIZE in layout.data:
        lost = walk is Walk.WRITE_HEAVY and at % PAGE_SIZE < mode.word_size
        changed = sum(a != b for a, b in zip(right, wrong, strict=True))
        assert changed == (0 if lost else 1)
    else:
        assert all(a != b for a, b in zip(right, wrong, strict=True))


@given(st.sampled_from(Walk), st.integers(0, 1023))
def test_a_wrong_top_bit_changes_the_checksum_however_often_its_page_is_met(walk, word):
    layout = Layout(16 * PAGE_SIZE, Mode.REAL, vcpus=15)  # one page each, met up to four times
    memory = bytearray(layout.memory_size)
    right = expect(layout, walk, memory).checksums
    memory[3 * PAGE_SIZE + 4 * word + 3] ^= 0x80
    wrong = expect(layout, walk, memory).checksums
    assert (right == wrong) == (walk is Walk.WRITE_HEAVY and word == 0)


def test_refuses_memory_of_another_size():
    with pytest.raises(ValueError, match="for a guest of 65536"):
        expect(Layout(16 * PAGE_SIZE, Mode.REAL), Walk.RANDOM, bytes(PAGE_SIZE))


def test_leaves_the_initial_memory_alone():
    layout = Layout(16 * PAGE_SIZE, Mode.REAL)
    memory = initial_memory(layout, Walk.RANDOM, seed=1)
    before = bytes(memory)
    assert expect(layout, Walk.RANDOM, memory).memory != before
    assert memory == before


def test_is_fast_enough_for_64_mib():
    layout = Layout(8 << 20, Mode.LONG_CPL3)
    memory = bytes(layout.memory_size)
    started = time.process_time()
    expect(layout, Walk.WRITE_HEAVY, memory)
    assert time.process_time() - started < 1.5 / 8 * 3  # three times slack for a busy machine
