"""Where pages come from: :class:`~guestfault.paging.source.base.PageSource` is all a source is."""
