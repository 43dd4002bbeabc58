"""The host as Linux shows it: thin, typed, one object per file descriptor."""
