"""guestfault: when KVM_RUN fails on a guest access, say which and why, mend it, and run on."""

__version__ = "0.1.0"
