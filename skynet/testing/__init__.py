"""LocalSwarm (real processes on loopback) and fakes, for our tests and for users."""
