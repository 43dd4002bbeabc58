"""The questions of the thread, one to a module, each written once for all dialects.

A module describes its world plainly, what there is and who does what, and never what it expects to
come of it: that is for the search to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios import (
    ack_from_userspace,
    async_for_ever,
    async_ready,
    bitmap,
    conversion,
    conversion_async,
    dirty_log,
    exit_reason_between_runs,
    helper_without_vcpu,
    invalidation,
    postcopy,
    pusha,
    realmode_event,
    slot_change,
    stale_exit_reason,
    suppressed,
    third_sleeper,
)

__all__ = ["SCENARIOS"]

SCENARIOS: Mapping[str, Scenario] = MappingProxyType(
    {
        scenario.name: scenario
        for scenario in (
            postcopy.SCENARIO,
            suppressed.THEN_ABSENT,
            suppressed.THEN_LOST,
            async_ready.SCENARIO,
            ack_from_userspace.SCENARIO,
            pusha.THEN_ABSENT,
            pusha.THEN_LOST,
            pusha.THEN_SS,
            realmode_event.SCENARIO,
            helper_without_vcpu.NOT_LOADED,
            helper_without_vcpu.ANOTHER_LOADED,
            async_for_ever.ABSENT,
            async_for_ever.LOST,
            stale_exit_reason.SCENARIO,
            exit_reason_between_runs.SCENARIO,
            third_sleeper.SCENARIO,
            invalidation.SCENARIO,
            slot_change.DELETE,
            slot_change.MOVE,
            dirty_log.SCENARIO,
            bitmap.CLEARED,
            bitmap.UNREADABLE,
            conversion.ANSWERED,
            conversion.OBEYED,
            conversion_async.SCENARIO,
        )
    }
)
"""By name, in the order of the table."""
