import pytest

from guestfault.linux.userfaultfd_flags import Feature, Ioctl, Mode, mend
from guestfault.uapi import userfaultfd as uapi


@pytest.mark.parametrize(
    ("flags", "prefix"), [(Feature, "UFFD_FEATURE_"), (Mode, "UFFDIO_REGISTER_MODE_")]
)
def test_every_bit_of_the_header_has_its_name(flags, prefix):
    header = {k.removeprefix(prefix): v for k, v in vars(uapi).items() if k.startswith(prefix)}
    not_wrapped = {"RWP", "RWP_ASYNC"}
    assert {flag.name: flag.value for flag in flags}.items() <= header.items()
    assert header.keys() - {flag.name for flag in flags} <= not_wrapped


def test_ioctl_bits_are_the_ordinals():
    for bit in Ioctl:
        assert bit.value == 1 << getattr(uapi, f"_UFFDIO_{bit.name}")


def test_mend_names_the_release_that_has_them_all():
    assert mend(Feature.EVENT_REMOVE) == "use Linux 4.11 or later"
    assert mend(Feature.MINOR_SHMEM | Feature.SIGBUS) == "use Linux 5.14 or later"
    assert mend(Feature.MOVE | Feature.WP_ASYNC) == "use Linux 6.8 or later"
    assert mend(Feature.MOVE | Feature(1 << 40)) == "use a newer kernel"
