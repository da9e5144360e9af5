"""Benchmarks: raylaunch beside its peers. `make bench` runs bench.py; README.md says how it is measured."""
