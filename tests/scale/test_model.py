from dataclasses import replace

import pytest

from guestfault.scale.costs import PUBLISHED_MACHINE as COSTS
from guestfault.scale.model import Way, pages_per_second
from guestfault.scale.published import Layout


def test_one_vcpu_alone_takes_its_own_costs():
    rate = pages_per_second(COSTS, 1, Way.EXITS)
    assert rate == pytest.approx(1e6 / COSTS.exit_alone, rel=0.02)
    c = COSTS
    per_fault = (
        c.vcpu + c.enqueue + c.reader_wake + c.read + c.handler + c.space_alone + c.wake + c.walk
    ) + c.vcpu_wake
    assert pages_per_second(c, 1, Way.UFFD) == pytest.approx(1e6 / per_fault, rel=0.02)


def test_the_walk_over_the_waiters_is_what_makes_the_shared_userfaultfd_fall():
    few = pages_per_second(COSTS, 16, Way.UFFD)
    many = pages_per_second(COSTS, 256, Way.UFFD, effort=0.5)
    assert many < few / 2
    no_walk = replace(COSTS, walk=0.0)
    few = pages_per_second(no_walk, 16, Way.UFFD)
    assert pages_per_second(no_walk, 256, Way.UFFD, effort=0.5) > 0.7 * few


def test_with_a_userfaultfd_each_nobody_walks_over_the_others():
    shared = pages_per_second(COSTS, 64, Way.UFFD, Layout.SHARED)
    each = pages_per_second(COSTS, 64, Way.UFFD, Layout.PER_VCPU)
    assert each > 1.5 * shared


def test_exits_are_bound_by_the_address_space_in_the_end():
    rate = pages_per_second(COSTS, 256, Way.EXITS)
    assert rate < 1e6 / COSTS.space_each


def test_a_vm_without_a_vcpu_is_refused():
    with pytest.raises(ValueError, match="0 vCPUs"):
        pages_per_second(COSTS, 0, Way.EXITS)
