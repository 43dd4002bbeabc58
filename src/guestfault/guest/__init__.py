"""Guests: the built-in ones, how they are assembled and predicted, and snapshots of any guest."""
