"""The statement that settles a batch: one round trip, one transaction.

In order: insert the settlements that are new (by job id, so that two writers never wait for each other in a circle);
lock the balances that they touch, by name; share out what each buyer has over his jobs in order of arrival; write
segments, node counts and transfers; add up the transfers per account and move each balance once. Jobs that were settled
before fall out at the first step and are told by the answer: only jobs of this batch's own inserts reach the money.

Two things are not taste. Balances are inserted apart from updating them, because PostgreSQL tests CHECK constraints on
the row proposed to INSERT ... ON CONFLICT DO UPDATE, and a debit alone is a negative balance. And they are updated from
what `locked` read, not from the row itself: an UPDATE tests its CHECK constraints once with the row of its snapshot
before it notices that a credit was committed meanwhile and looks again.
"""

from typing import Final

# Parameters, in this order; the names are those of gpumesh_metering.store.SettleBatch. Kinds:
# text: a text[]. Few of them: equal terms and makers of a batch are sent once, and jobs and segments refer to them by
# number. int: the literal of a bigint[], as one text. PostgreSQL reads it faster than the driver encodes 200 integers
# one by one (0.11 us each). ids: job ids (16 bytes) or transfers' digests (TransferIds.digest, 20 bytes), one after the
# other in one bytea.
TERMS: Final = ("account_id", "key_id", "model_id", "model_revision", "reason")
TERMS_INT: Final = (
    "modality",
    "outcome",
    "source",
    "price_version",
    "input_nano_usd_per_mtok",
    "output_nano_usd_per_mtok",
    "cached_input_nano_usd_per_mtok",
)
JOB_INT: Final = (
    "terms",
    "prompt_tokens",
    "completion_tokens",
    "cached_prompt_tokens",
    "reasoning_tokens",
    "charge_nano_usd",
    "fee_nano_usd",
    "hold_nano_usd",
)
MAKERS: Final = ("provider_id", "node_id", "quantisation", "engine_name", "engine_version")
SEGMENT_INT: Final = ("place", "maker", "fence", "start_token", "end_token", "pay_nano_usd")
COUNT_INT: Final = ("place", "fence", "prompt_tokens", "completion_tokens", "cached_prompt_tokens", "reasoning_tokens")
_COUNTED: Final = ", ".join(COUNT_INT[1:])


class _Parameters:
    """Numbers the parameters in the order in which they are asked for."""

    def __init__(self) -> None:
        self.used = 0

    def one(self, kind: str) -> str:
        self.used += 1
        return f"${self.used}::{kind}"

    def texts(self, names: tuple[str, ...]) -> str:
        return ", ".join(self.one("text[]") for _ in names)

    def ints(self, names: tuple[str, ...]) -> str:
        return ", ".join(self.one("text") + "::bigint[]" for _ in names)


def _settle() -> str:
    ask = _Parameters()
    terms = f"unnest({ask.texts(TERMS)}, {ask.ints(TERMS_INT)}) WITH ORDINALITY AS t({', '.join(TERMS + TERMS_INT)}, number)"
    jobs = f"unnest({ask.ints(JOB_INT)}) WITH ORDINALITY AS j({', '.join(JOB_INT)}, place)"
    job_ids, charge_ids, shortfall_ids = ask.one("bytea"), ask.one("bytea"), ask.one("bytea")
    makers = f"unnest({ask.texts(MAKERS)}) WITH ORDINALITY AS m({', '.join(MAKERS)}, number)"
    segments = f"unnest({ask.ints(SEGMENT_INT)}) WITH ORDINALITY AS s({', '.join(SEGMENT_INT)}, line)"
    pay_ids = ask.one("bytea")
    counts = f"unnest({ask.ints(COUNT_INT)}) AS c({', '.join(COUNT_INT)})"
    columns = ", ".join(TERMS + TERMS_INT + JOB_INT[1:])
    return f"""
WITH job AS MATERIALIZED (
    SELECT substr({job_ids}, (place::int - 1) * 16 + 1, 16) AS job_id,
        substr({charge_ids}, (place::int - 1) * 20 + 1, 16) AS charge_id,
        substr({shortfall_ids}, (place::int - 1) * 20 + 1, 16) AS shortfall_id, place, {columns}
    FROM {jobs} JOIN {terms} ON t.number = j.terms
), settled AS (
    INSERT INTO metering.settlements (job_id, {columns})
    SELECT job_id, {columns} FROM job ORDER BY job_id
    ON CONFLICT (job_id) DO NOTHING RETURNING job_id
), fresh AS MATERIALIZED (
    SELECT job.job_id, account_id, charge_nano_usd, charge_id, shortfall_id, place FROM job JOIN settled USING (job_id)
), paid AS MATERIALIZED (
    SELECT fresh.job_id, fence, start_token, end_token, {", ".join(MAKERS)}, pay_nano_usd,
        substr({pay_ids}, (line::int - 1) * 20 + 1, 16) AS pay_id
    FROM {segments} JOIN {makers} ON m.number = s.maker JOIN fresh USING (place)
), charged AS MATERIALIZED (
    SELECT * FROM fresh WHERE charge_nano_usd > 0
), touched AS (
    SELECT 'buyer:available' COLLATE "C" AS account, account_id AS owner_id FROM charged
    UNION SELECT 'provider:pending', provider_id FROM paid WHERE pay_nano_usd > 0
    UNION SELECT 'platform:fees', 'platform' FROM charged
    UNION SELECT 'platform:insurance', 'platform' FROM charged
), locked AS (
    SELECT account, owner_id, posted_nano_usd AS posted, reserved_nano_usd AS reserved, version FROM metering.balances
    WHERE (account, owner_id) IN (SELECT account, owner_id FROM touched)
    ORDER BY account, owner_id FOR UPDATE
), taken AS (
    SELECT charged.*, greatest(0, least(charge_nano_usd, coalesce(posted - reserved, 0) + charge_nano_usd -
    sum(charge_nano_usd)
        OVER (PARTITION BY account_id ORDER BY place)))::bigint AS amount
    FROM charged LEFT JOIN locked ON locked.account = 'buyer:available' AND locked.owner_id = charged.account_id
), line AS (
    SELECT charge_id AS id, 'buyer:available' AS debit_account, account_id AS debit_owner,
        'platform:fees' AS credit_account, 'platform' AS credit_owner, amount, 'settle.charge' AS purpose, job_id
    FROM taken WHERE amount > 0
    UNION ALL SELECT shortfall_id, 'platform:insurance', 'platform', 'platform:fees', 'platform',
        charge_nano_usd - amount, 'settle.shortfall', job_id
    FROM taken WHERE amount < charge_nano_usd
    UNION ALL SELECT pay_id, 'platform:fees', 'platform', 'provider:pending', provider_id, pay_nano_usd, 'settle.pay',
    job_id FROM paid WHERE pay_nano_usd > 0
), written AS (
    INSERT INTO metering.transfers (transfer_id, kind, debit_account, debit_owner, credit_account, credit_owner,
        amount_nano_usd, purpose, job_id)
    -- The first half of a SHA-1 with version 5 and variant 10 written into it: RFC 9562, 5.5.
    SELECT encode(set_byte(set_byte(id, 6, get_byte(id, 6) & 15 | 80), 8, get_byte(id, 8) & 63 | 128), 'hex')::uuid, 1,
    debit_account, debit_owner, credit_account, credit_owner, amount, purpose, job_id FROM line RETURNING debit_account,
    debit_owner, credit_account, credit_owner, amount_nano_usd
), delta AS (
    SELECT account, owner_id, sum(amount)::bigint AS amount FROM (
        SELECT debit_account, debit_owner, -amount_nano_usd FROM written
        UNION ALL SELECT credit_account, credit_owner, amount_nano_usd FROM written) AS side(account, owner_id, amount)
    GROUP BY account, owner_id
), moved AS (
    UPDATE metering.balances AS b SET posted_nano_usd = posted + amount, reserved_nano_usd = reserved, version =
    locked.version + 1 FROM delta JOIN locked USING (account, owner_id) WHERE b.account = delta.account AND b.owner_id =
    delta.owner_id RETURNING b.account, b.owner_id, b.posted_nano_usd - b.reserved_nano_usd AS available, b.version
), opened AS (
    INSERT INTO metering.balances AS b (account, owner_id, posted_nano_usd)
    SELECT account, owner_id, amount FROM delta
    WHERE NOT EXISTS (SELECT FROM moved WHERE moved.account = delta.account AND moved.owner_id = delta.owner_id)
    ORDER BY account, owner_id
    ON CONFLICT (account, owner_id) DO UPDATE SET posted_nano_usd = b.posted_nano_usd + excluded.posted_nano_usd,
    version = b.version + 1
), kept_segments AS (
    INSERT INTO metering.segments (job_id, fence, start_token, end_token, {", ".join(MAKERS)}, pay_nano_usd)
    SELECT job_id, fence, start_token, end_token, {", ".join(MAKERS)}, pay_nano_usd FROM paid
), kept_counts AS (
    INSERT INTO metering.node_counts (job_id, {_COUNTED})
    SELECT fresh.job_id, {_COUNTED} FROM {counts} JOIN fresh USING (place) ON CONFLICT DO NOTHING
)
SELECT (SELECT count(*) FROM fresh) AS settled,
    (SELECT array_agg(place) FROM job WHERE NOT EXISTS (SELECT FROM fresh WHERE fresh.place = job.place)) AS repeated,
    owners, available, versions
FROM (SELECT array_agg(owner_id) AS owners, array_agg(available) AS available, array_agg(version) AS versions
    FROM moved WHERE account = 'buyer:available') AS buyers
"""  # noqa: S608 -- built from the constants above alone


# Answer: one row: settled (how many are new), repeated (places, from 1, of those that are not), and the buyers whose
# balance changed: owners, available, versions.
SETTLE: Final = _settle()
