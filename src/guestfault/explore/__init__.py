"""Interleavings of the kernel half, and what each published interface does under them.

The code that runs here is softkvm's and the user half's own.  What is modelled is what they stand
on: a processor that runs a script, an address space of a few pages, and threads that are
coroutines, so that the order of events can be chosen, enumerated and replayed.
"""
