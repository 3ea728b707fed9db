"""Pure cores of the scheduler: jobs, sessions, queue, choice, tickets, reconciliation.

Time and ids come in as arguments, effects go out as data.
"""
