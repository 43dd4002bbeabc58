"""A guest whose memory KVM itself reads: OUTS from pages that are absent.

No KVM can say of these accesses that they failed: they come as KVM_EXIT_MMIO on RAM, from the
software KVM as from the real one, and have to be answered from the page.
"""

from pathlib import Path

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.guest.layout import PAGE_SIZE
from guestfault.guest.layout import Mode as GuestMode
from guestfault.paging.source.function import FunctionSource
from guestfault.vmm.session import Mode, Session

# mov ecx, 2; mov edx, RESULT_PORT; cld; rep outsd; mov edx, DONE_PORT; out dx, al; jmp $
CODE = bytes.fromhex("b902000000 ba11000000 fc f36f ba12000000 ee ebfe")


def with_code(snapshot, code):
    memory = Path(snapshot.memory_path).read_bytes()
    memory = code + memory[len(code) :]
    return memory, FunctionSource(len(memory), lambda at, size: memory[at : at + size])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mode", [GuestMode.LONG_CPL3, GuestMode.LONG_CPL0])
@pytest.mark.parametrize("name", [*DIALECTS, "kvm"])
def test_what_outs_sends_is_what_the_page_holds(open_system, snapshot, layout_of, name, mode):
    system = open_system(name)
    taken = snapshot(1 << 20, mode)
    memory, source = with_code(taken, CODE)
    with Session(system, taken, source, Mode.EXIT) as session:
        assert session.run(), session.failure
        [loop] = session.vcpus
        data = layout_of(taken).header_pages * PAGE_SIZE
        assert loop.console.checksum == int.from_bytes(memory[data : data + 8], "little")
        assert loop.resolver.account.ram_mmio >= 1
