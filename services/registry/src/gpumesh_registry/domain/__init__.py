"""The registry's rules. Pure: time, ids and randomness come in as arguments."""
