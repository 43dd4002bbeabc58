"""What this machine offers, what is missing, and the step that would mend it.

A refusal says ``EPERM`` and not who refused; a missing feature says ``EINVAL`` and not since when
it exists.  The people who run virtual machines meet these answers through three layers of
container and policy, and lose a day to each.  This room asks every question that the rest of
guestfault depends on and turns each answer into a :class:`~guestfault.check.finding.Finding`:
what was found, what it is needed for, and what to do.

One module per subject, each with a ``probe`` that takes the paths it looks at as parameters, so
that a test can show it another machine.  :mod:`~guestfault.check.survey` asks them all;
:mod:`~guestfault.check.report` prints the answers.

It only looks.  It opens devices, creates a VM and a userfaultfd and closes them again; it never
mounts anything and never changes a setting.
"""
