"""The command line. The load test and the simulation know nothing else of the service."""
