"""A forge and a model that run in this process, for the demo, the tests and the benchmarks: real protocols, no outside service."""
