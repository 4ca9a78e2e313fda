"""The ways of doing the same work that the benchmarks beside this folder compare."""
