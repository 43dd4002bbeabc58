"""Where pages come from.  A source is one method: :class:`~guestfault.paging.source.base.PageSource`."""
