"""A report for people."""

from __future__ import annotations

from guestfault.vmm.report import AheadReport, Latency, LostPage, Report, VcpuReport

__all__ = ["as_text"]


def as_text(r: Report) -> str:
    """The report in some fifteen lines."""
    rows = [
        ("KVM", f"{r.kvm}, mode {r.mode}, absent pages: {r.absent}"),
        ("guest", f"{r.guest}, {_size(r.memory)}, {_count(len(r.vcpus), 'vCPU')}"),
        ("first instruction", _seconds(r.first_instruction)),
        ("run time", _seconds(r.seconds)),
        ("pages in", f"{r.pages_in} of {r.pages}" + _eager(r.eager_pages)),
        *_ahead(r),
        ("faults", _faults(r)),
    ]
    if r.latency.max:
        rows.append(("latency", _latency(r.latency)))
    if any(v.bare for v in r.vcpus):
        rows.append(("named by", _named(r)))
    rows += [(f"vCPU {v.vcpu}", _vcpu(v)) for v in r.vcpus]
    if r.lost_pages:
        rows.append(("lost pages", ", ".join(map(_lost, r.lost_pages))))
    if r.memory_right is not None:
        rows.append(("memory", "as expected" if r.memory_right else "NOT as expected"))
    if r.failure is not None:
        rows.append(("failure", r.failure))
    rows.append(("verdict", r.verdict))
    return "\n".join(f"{name:18} {text}" for name, text in rows)


def _eager(n: int) -> str:
    return f", {n} of them before the start" if n else ""


_AHEAD = {"around": "around those", "prefetch": "prefetched", "push": "pushed"}


def _ahead(r: Report) -> list[tuple[str, str]]:
    """On demand or not, where some were not."""
    rows = [(_AHEAD[why], _useful(count)) for why, count in r.ahead.items() if count.pages]
    if rows:
        rows.insert(0, ("on demand", str(r.demanded)))
    if r.prefetch is not None and r.prefetch.failed:
        n = _count(r.prefetch.failed, "read")
        then = ", and no more were tried" if r.prefetch.gave_up else ""
        rows.append(("in advance", f"{n} failed{then}"))
    return rows


def _useful(count: AheadReport) -> str:
    if count.span is None:
        return f"{count.pages}, of use or not (none was withheld to find out)"
    least, most = (f"{100 * fraction:.0f}" for fraction in count.span)
    because = f"{count.wanted} of {count.withheld} that were withheld were asked for"
    return f"{count.pages}, {least} to {most} % of use: {because}"


def _faults(r: Report) -> str:
    kinds = [
        (sum(v.annotated for v in r.vcpus), "annotated"),
        (sum(v.bare for v in r.vcpus), "bare"),
        (sum(v.fetches for v in r.vcpus), "as internal errors"),
        (sum(v.silent for v in r.vcpus), "without an exit"),
        (sum(v.ram_mmio for v in r.vcpus), "as MMIO on RAM"),
        (r.userfaults, "through userfaultfd"),
    ]
    total = sum(n for n, _ in kinds)
    text = f"{total}: " + ", ".join(f"{n} {kind}" for n, kind in kinds if n) if total else "none"
    again = sum(v.again for v in r.vcpus)
    return f"{text}; {again} on a page that was in already" if again else text


def _latency(latency: Latency) -> str:
    figures = (
        ("p50", latency.p50),
        ("p90", latency.p90),
        ("p99", latency.p99),
        ("max", latency.max),
    )
    return ", ".join(f"{name} {_us(ns)}" for name, ns in figures)


def _named(r: Report) -> str:
    kinds = [
        (sum(v.by_tracepoint for v in r.vcpus), "the tracepoints"),
        (sum(v.by_decode for v in r.vcpus), "decoding the instruction"),
    ]
    text = ", ".join(f"{kind} {n}" for n, kind in kinds if n) or "nobody"
    unsure = sum(v.unsure for v in r.vcpus)
    return f"{text}; {unsure} with more than one in question" if unsure else text


def _vcpu(v: VcpuReport) -> str:
    if not v.done:
        return f"not done, at rip {v.rip:#x}"
    if v.checksum is None:
        return "done"
    if v.expected is None:
        return f"done, checksum {v.checksum:#018x}"
    if v.checksum == v.expected:
        return f"done, checksum {v.checksum:#018x} is right"
    return f"done, checksum {v.checksum:#018x} is WRONG: {v.expected:#018x} was expected"


def _lost(page: LostPage) -> str:
    where = f"hva {page.hva:#x}" if page.gpa is None else f"gpa {page.gpa:#x}"
    return f"{where} ({'accessed by' if page.accessed else 'told to'} vCPU {page.vcpu})"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _size(n: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n >> shift and not n % (1 << shift):
            return f"{n >> shift} {unit}"
    return f"{n} bytes"


def _seconds(s: float | None) -> str:
    if s is None:
        return "never"
    return f"{s * 1e3:.1f} ms" if s < 1 else f"{s:.2f} s"


def _us(ns: int) -> str:
    return f"{ns / 1e3:.1f} us" if ns < 1_000_000 else f"{ns / 1e6:.1f} ms"
