"""The experiment at a small size on the KVMs of this machine, and what is made of its figures."""

from __future__ import annotations

from contextlib import closing

import pytest

from guestfault.bench.experiment import run_once
from guestfault.bench.paging import as_json, as_text, measure
from guestfault.bench.ping_pong import ping_pong
from guestfault.bench.plain import PlainEngine
from guestfault.bench.prediction import CalibrationError, calibrate, rates_of
from guestfault.bench.shape import Fault, Shape, Uffds, Way
from guestfault.errors import Unavailable
from guestfault.fault.locate.run_trace import RunTrace
from guestfault.kvm.system import KvmSystem
from guestfault.linux.tracefs import Tracefs
from guestfault.scale.costs import PUBLISHED_MACHINE
from guestfault.scale.model import Way as ModelWay
from guestfault.scale.model import pages_per_second
from guestfault.softkvm.system import SoftSystem

pytestmark = pytest.mark.timeout(120)
PAGES = 200


def plain(system: SoftSystem) -> PlainEngine:
    return PlainEngine(system, system.dialect.interface, annotates=True)


@pytest.mark.parametrize("way", list(Way))
@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("uffds", list(Uffds))
def test_every_shape_runs_on_the_software_kvm(need_uffd, way, fault, uffds) -> None:
    with closing(SoftSystem("seed")) as system:
        run = run_once(system, Shape(way, 2, PAGES, fault, uffds), plain(system))
    assert run.faults >= 2 * PAGES
    assert run.latency.count == run.faults
    assert len(run.each) == 2
    assert run.rate > 0
    assert run.rate_per_vcpu > 0
    assert 0 <= run.elsewhere <= 1.5


@pytest.mark.parametrize("way", list(Way))
@pytest.mark.parametrize("vcpus", [1, 2])
def test_compiled_on_the_real_kvm(need_uffd, tracefs, monkeypatch, way, vcpus) -> None:
    pytest.importorskip("numba", reason="numba is not installed: pip install 'guestfault[fast]'")
    from guestfault.bench.compiled import CompiledEngine

    try:
        system = KvmSystem()
        RunTrace(tracefs).close()
    except Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(Tracefs, "find", lambda: tracefs)
    with closing(system):
        engine = CompiledEngine(system, timed=True)
        for fault in Fault:
            run = run_once(system, Shape(way, vcpus, 4 * PAGES, fault, readers=vcpus), engine)
            assert run.faults >= vcpus * 4 * PAGES
            if way is Way.EXIT:
                assert run.in_python <= run.faults // 20
                assert run.outside_ns is not None
                assert run.outside_ns > 0


@pytest.mark.parametrize("way", list(Way))
def test_nobody_sleeps_through_a_wake_up(need_uffd, way) -> None:
    """Invariant: whoever waits for a page that another brings in is woken when it is in."""
    with closing(SoftSystem("seed")) as system:
        faults = ping_pong(system, system.dialect.interface, way, vcpus=8, runs=150)
    assert faults >= 2 * 150


def test_a_summary_has_what_was_measured(need_uffd) -> None:
    shapes = [Shape(way, n, PAGES, readers=n) for n in (1, 2) for way in Way]
    with closing(SoftSystem("seed")) as system:
        engine = plain(system)
        summaries = measure(system, engine, shapes, rounds=2)
        plain_data, text = (f(system, engine, summaries) for f in (as_json, as_text))
    assert [summary.shape for summary in summaries] == shapes
    assert all(len(row["rates"]) == 2 for row in plain_data["results"])
    assert all(
        row["rate_least"] <= row["rate"] <= row["rate_most"] for row in plain_data["results"]
    )
    assert all(sum(n for _, n in row["latency_histogram"]) > 0 for row in plain_data["results"])
    assert "exit over uffd" in text
    rates, layout = rates_of(plain_data)
    assert set(rates) == {("exit", 1), ("exit", 2), ("uffd", 1), ("uffd", 2)}
    assert layout is Uffds.SHARED


def test_calibrated_costs_give_the_measured_rates_back() -> None:
    rates = {("exit", 1): 21e3, ("exit", 2): 39e3, ("uffd", 1): 10e3, ("uffd", 2): 17e3}
    costs = calibrate(rates)
    for (way, n), rate in rates.items():
        model_way = ModelWay.EXITS if way == "exit" else ModelWay.UFFD
        assert pages_per_second(costs, n, model_way) == pytest.approx(rate, rel=0.05)
    assert costs.walk == PUBLISHED_MACHINE.walk


@pytest.mark.parametrize("measured", [None, [], {}, {"results": [{"way": "exit"}]}])
def test_what_is_no_measurement_is_refused(measured) -> None:
    with pytest.raises(CalibrationError):
        rates_of(measured)


def test_one_way_alone_does_not_calibrate() -> None:
    with pytest.raises(CalibrationError, match="both ways"):
        calibrate({("exit", 1): 1e4})
