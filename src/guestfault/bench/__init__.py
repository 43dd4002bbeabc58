"""What demand paging costs on this machine, and what that says of larger ones.

:mod:`~guestfault.bench.paging` measures both ways of bringing pages in, in the shape in which the
series' figures were measured, so that they can be put beside each other;
:mod:`~guestfault.bench.prediction` carries the result to numbers of vCPUs that this machine has
not got.
"""
