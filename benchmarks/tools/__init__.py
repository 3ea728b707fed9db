"""What the benchmarks share: load, a mock engine, a bare proxy, CPU accounting, reports."""
