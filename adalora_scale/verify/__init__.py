"""Does this machine train the same adapter on every engine? The equivalence matrix as a command."""
