"""Resolving a failed access: bring the page in from its source, exactly once, and account for it.

- :mod:`~guestfault.paging.source`: where pages come from;
- :mod:`~guestfault.paging.pager`: the state of every page, and the one road by which it comes in;
- :mod:`~guestfault.paging.resolver`: what a vCPU's own thread does about its failed access;
- :mod:`~guestfault.paging.handler`: the other way, a thread that serves userfaultfd;
- :mod:`~guestfault.paging.working_set`, :mod:`~guestfault.paging.prefetcher`: what an earlier run
  touched, brought in before it is asked for;
- :mod:`~guestfault.paging.around`: for one fault, the pages that would be the next;
- :mod:`~guestfault.paging.ahead`: whether what came in unasked was of use;
- :mod:`~guestfault.paging.guard`: the same fault again and again is an error;
- :mod:`~guestfault.paging.histogram`, :mod:`~guestfault.paging.account`: what it cost.
"""
