import errno
import os

from guestfault.linux import procfs


def test_sysctl():
    assert procfs.sysctl("kernel.osrelease") == os.uname().release
    assert procfs.sysctl("kernel.no_such_thing") is None


def test_status_is_ours():
    assert procfs.status()["Pid"] == str(os.getpid())


def test_capabilities_go_with_the_privilege(child):
    out = child(
        "from guestfault.linux import procfs\nprint(procfs.has_capability(procfs.CAP_SYS_PTRACE))",
        "print(procfs.has_capability(procfs.CAP_SYS_PTRACE), procfs.seccomp_filtered())",
        unprivileged=True,
        refuse=((999, None, errno.EPERM),),
    )
    before, after, filtered = out.split()
    assert before == str(procfs.has_capability(procfs.CAP_SYS_PTRACE))
    assert (after, filtered) == ("False", "True")
