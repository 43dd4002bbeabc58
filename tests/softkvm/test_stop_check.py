"""A vCPU that is stopped from another thread goes on as if it had not been."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from guestfault.softkvm.stop_check import StopFlag

# rax counts 512 increments of memory a round: inc qword [rdi]; add rdi, 8; dec ecx; jnz; repeat
ROUND = "bf00000400 b900020000 48ff07 4883c708 ffc9 75f5 48ffc0 ebe6"
CELLS = 512


@pytest.mark.timeout(60)
def test_no_read_modify_write_is_made_twice_or_left_out(soft) -> None:
    """The invariant: at any stop the cells are those of a run that was never stopped."""
    machine = soft(ROUND, rax=0)
    machine.bring_in(0, machine.RAM_SIZE)
    done = False

    def storm() -> None:
        while not done:
            time.sleep(0.0005)
            machine.vcpu.kick()

    kicker = threading.Thread(target=storm)
    kicker.start()
    try:
        for _ in range(400):
            assert machine.vcpu.run() == -errno.EINTR
            regs = machine.regs
            cells = [machine.word(machine.DATA + 8 * i) for i in range(CELLS)]
            rounds = cells[-1]
            cut = next((i for i, n in enumerate(cells) if n == rounds), CELLS)
            assert cells == [rounds + 1] * cut + [rounds] * (CELLS - cut)
            assert regs.rax in (rounds, rounds - 1)  # the last cell comes before the count
    finally:
        done = True
        kicker.join()
    assert rounds > 100


def test_the_flag_is_per_engine() -> None:
    one, other = StopFlag(), StopFlag()
    assert one.data != other.data
