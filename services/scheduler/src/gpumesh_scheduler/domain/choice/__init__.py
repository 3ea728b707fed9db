"""Where a job runs: filter, score, pick. Each a small pure module; a new rule is a new function in one of them."""
