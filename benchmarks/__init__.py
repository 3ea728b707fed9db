"""Benchmarks: ratios against a baseline in the same run, in work per CPU-second. `make bench`, `make bench-link`, `make bench-ledger`."""
