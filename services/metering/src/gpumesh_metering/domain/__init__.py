"""Money in pure code: ledger, prices, settlement, invariants. No I/O, no clock, no randomness."""
