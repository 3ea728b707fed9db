"""The ledger's invariants over a live database: one query each, in one snapshot. The judgements of
domain/invariants.py, as SQL.

A query gives what is wrong, at most 20 rows; no row means that the invariant holds.
"""

from collections.abc import Callable
from typing import Any, Final

from gpumesh_metering.store import CheckResult
from gpumesh_runtime.database import Database

_CHECK_S: Final = 300.0  # the fold reads every transfer

_SUM: Final = "SELECT sum(posted_nano_usd) FROM metering.balances HAVING sum(posted_nano_usd) <> 0"
_BELOW_ZERO: Final = """
SELECT account, owner_id, posted_nano_usd - reserved_nano_usd FROM metering.balances
WHERE account IN ('buyer:available', 'buyer:leased', 'provider:pending', 'provider:available')
    AND posted_nano_usd < reserved_nano_usd LIMIT 20
"""
_DEBIT_CREDIT: Final = """
WITH money AS (
    SELECT job_id,
        coalesce(sum(amount_nano_usd) FILTER (WHERE credit_account = 'platform:fees'
            AND debit_account IN ('buyer:available', 'platform:insurance')), 0) AS paid_in,
        coalesce(sum(amount_nano_usd) FILTER (WHERE debit_account = 'platform:fees' AND credit_account =
        'provider:pending'), 0)
            AS paid_out,
        sum(amount_nano_usd) AS moved, count(*) FILTER (WHERE debit_account = 'buyer:available') AS debits,
        min(debit_owner) FILTER (WHERE debit_account = 'buyer:available') AS payer
    FROM metering.transfers WHERE job_id IS NOT NULL AND kind = 1 GROUP BY job_id
), pay AS (
    SELECT job_id, sum(pay_nano_usd) AS pays FROM metering.segments GROUP BY job_id
)
SELECT encode(job_id, 'hex'), s.charge_nano_usd, s.fee_nano_usd, coalesce(pays, 0), coalesce(paid_in, 0),
coalesce(paid_out, 0) FROM metering.settlements AS s FULL JOIN money USING (job_id) LEFT JOIN pay USING (job_id)
WHERE s.job_id IS NULL OR s.charge_nano_usd <> coalesce(paid_in, 0) OR coalesce(pays, 0) <> coalesce(paid_out, 0)
    OR s.charge_nano_usd <> s.fee_nano_usd + coalesce(pays, 0) OR coalesce(moved, 0) <> coalesce(paid_in, 0) +
    coalesce(paid_out, 0) OR coalesce(debits, 0) > 1 OR payer <> s.account_id
LIMIT 20
"""
_SEGMENTS: Final = """
SELECT encode(job_id, 'hex'), start_token, end_token, next FROM (
    SELECT job_id, start_token, end_token,
        coalesce(lag(end_token) OVER (PARTITION BY job_id ORDER BY start_token, end_token), 0) AS next
    FROM metering.segments) AS runs
WHERE start_token <> next LIMIT 20
"""
_FOLD: Final = """
WITH side AS (
    SELECT debit_account AS account, debit_owner AS owner_id, CASE WHEN kind = 2 THEN 0 ELSE -amount_nano_usd END AS
    posted,
        CASE WHEN kind = 2 THEN amount_nano_usd ELSE 0 END AS reserved
    FROM metering.transfers
    UNION ALL SELECT credit_account, credit_owner, CASE WHEN kind = 2 THEN 0 ELSE amount_nano_usd END, 0 FROM
    metering.transfers UNION ALL SELECT p.debit_account, p.debit_owner, 0, -p.amount_nano_usd
    FROM metering.transfers AS r JOIN metering.transfers AS p ON p.transfer_id = r.pending_id
), folded AS (
    SELECT account, owner_id, sum(posted) AS posted, sum(reserved) AS reserved FROM side GROUP BY account, owner_id
)
SELECT account, owner_id, coalesce(posted_nano_usd, 0), coalesce(reserved_nano_usd, 0), coalesce(posted, 0),
coalesce(reserved, 0) FROM metering.balances FULL JOIN folded USING (account, owner_id)
WHERE coalesce(posted_nano_usd, 0) <> coalesce(posted, 0) OR coalesce(reserved_nano_usd, 0) <> coalesce(reserved, 0)
LIMIT 20
"""
_RESOLUTIONS: Final = """
SELECT r.transfer_id FROM metering.transfers AS r LEFT JOIN metering.transfers AS p ON p.transfer_id = r.pending_id
WHERE r.pending_id IS NOT NULL AND (p.kind IS DISTINCT FROM 2 OR r.amount_nano_usd > p.amount_nano_usd) LIMIT 20
"""

_Sentence = Callable[[Any], str]
CHECKS: Final[tuple[tuple[str, _Sentence], ...]] = (
    (_SUM, lambda row: f"I1: all balances sum to {row[0]} nano-USD instead of 0."),
    (_BELOW_ZERO, lambda row: f"I2: {row[0]} of {row[1]} has {row[2]} nano-USD to spend."),
    (
        _DEBIT_CREDIT,
        lambda row: (
            f"I4: job {row[0]} charged {row[1]} with fee {row[2]} and pays {row[3]}, "
            f"but its transfers took {row[4]} and paid {row[5]}."
            if row[1] is not None
            else f"I4: transfers of job {row[0]} belong to no settlement."
        ),
    ),
    (_SEGMENTS, lambda row: f"I5: job {row[0]} has a segment {row[1]}..{row[2]} where {row[3]} was next."),
    (
        _FOLD,
        lambda row: (
            f"I7: {row[0]} of {row[1]} shows {row[2]} posted and {row[3]} reserved, "
            f"its transfers add up to {row[4]} and {row[5]}."
        ),
    ),
    (_RESOLUTIONS, lambda row: f"I7: transfer {row[0]} does not resolve a pending transfer properly."),
)


async def quick_check(database: Database) -> list[str]:
    """I1 and I2, which read balances alone: cheap enough for every minute. Raises Unavailable."""
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        return [sentence(row) for query, sentence in CHECKS[:2] for row in await connection.fetch(query)]


async def check(database: Database) -> CheckResult:
    """Runs every check. Raises Unavailable."""
    found: list[str] = []
    async with database.transaction(isolation="repeatable_read", readonly=True) as connection:
        for query, sentence in CHECKS:
            found += [sentence(row) for row in await connection.fetch(query, timeout=_CHECK_S)]
        transfers = await connection.fetchval("SELECT count(*) FROM metering.transfers", timeout=_CHECK_S)
        settlements = await connection.fetchval("SELECT count(*) FROM metering.settlements", timeout=_CHECK_S)
    return CheckResult(found, transfers, settlements)
