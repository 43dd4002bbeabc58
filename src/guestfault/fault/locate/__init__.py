"""Locators: each finds out, in its own way, which guest access a failed ``KVM_RUN`` was about.

They answer with an :class:`~guestfault.fault.access.Access`, or with ``None`` where they do not
know; they do not guess.
"""
