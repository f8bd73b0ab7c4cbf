"""Before and around a run on a cluster: does it fit, are the hosts healthy."""
