"""Object storage: what a URL may be, and the few things that are done with what it names."""
