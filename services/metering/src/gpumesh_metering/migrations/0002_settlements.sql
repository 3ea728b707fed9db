-- Settlements: one row per job, for ever. The row is the usage row too: what was billed, to whom, at which price.

CREATE TABLE metering.settlements (
    job_id                          bytea PRIMARY KEY CHECK (octet_length(job_id) = 16),
    settlement_no                   bigint GENERATED ALWAYS AS IDENTITY,  -- order of settling, for paging; has gaps
    account_id                      text COLLATE "C" NOT NULL CHECK (account_id <> ''),
    key_id                          text NOT NULL,
    model_id                        text COLLATE "C" NOT NULL,
    model_revision                  text NOT NULL,
    modality                        smallint NOT NULL,
    outcome                         smallint NOT NULL CHECK (outcome BETWEEN 1 AND 3),  -- gpumesh.common.v1.JobOutcome
    source                          smallint NOT NULL,                                  -- gpumesh.metering.v1.EvidenceSource
    reason                          text NOT NULL,
    prompt_tokens                   bigint NOT NULL CHECK (prompt_tokens >= 0),
    completion_tokens               bigint NOT NULL CHECK (completion_tokens >= 0),
    cached_prompt_tokens            bigint NOT NULL CHECK (cached_prompt_tokens BETWEEN 0 AND prompt_tokens),
    reasoning_tokens                bigint NOT NULL CHECK (reasoning_tokens BETWEEN 0 AND completion_tokens),
    charge_nano_usd                 bigint NOT NULL,
    fee_nano_usd                    bigint NOT NULL,
    hold_nano_usd                   bigint NOT NULL,
    price_version                   bigint NOT NULL,
    input_nano_usd_per_mtok         bigint NOT NULL,
    output_nano_usd_per_mtok        bigint NOT NULL,
    cached_input_nano_usd_per_mtok  bigint,
    settle_time                     timestamptz NOT NULL DEFAULT now(),
    CHECK (charge_nano_usd BETWEEN 0 AND hold_nano_usd),
    CHECK (fee_nano_usd BETWEEN 0 AND charge_nano_usd),
    CHECK (outcome <> 3 OR charge_nano_usd = 0)
);
CREATE UNIQUE INDEX settlements_no ON metering.settlements (settlement_no);
CREATE INDEX settlements_account ON metering.settlements (account_id, settlement_no);

-- Runs of output tokens of a job and who was paid for them; pays are keyed by (job, fence).
CREATE TABLE metering.segments (
    job_id          bytea NOT NULL REFERENCES metering.settlements,
    fence           bigint NOT NULL CHECK (fence >= 0),
    start_token     bigint NOT NULL CHECK (start_token >= 0),
    end_token       bigint NOT NULL CHECK (end_token >= start_token),
    provider_id     text COLLATE "C" NOT NULL CHECK (provider_id <> ''),
    node_id         text COLLATE "C" NOT NULL,
    quantisation    text NOT NULL,
    engine_name     text NOT NULL,
    engine_version  text NOT NULL,
    pay_nano_usd    bigint NOT NULL CHECK (pay_nano_usd >= 0),
    PRIMARY KEY (job_id, fence)
);

-- What nodes counted: evidence beside the settlement, never money.
CREATE TABLE metering.node_counts (
    job_id                bytea NOT NULL REFERENCES metering.settlements,
    fence                 bigint NOT NULL,
    prompt_tokens         bigint NOT NULL,
    completion_tokens     bigint NOT NULL,
    cached_prompt_tokens  bigint NOT NULL,
    reasoning_tokens      bigint NOT NULL,
    PRIMARY KEY (job_id, fence)
);

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON metering.settlements
    FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON metering.segments
    FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON metering.node_counts
    FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change();

-- Receipts that came without a delivered record. They wait here for ten minutes; a job that settles meanwhile answers them.
CREATE TABLE metering.parked_receipts (
    job_id     bytea NOT NULL CHECK (octet_length(job_id) = 16),
    fence      bigint NOT NULL,
    evidence   bytea NOT NULL,                         -- gpumesh.metering.v1.Settle, encoded
    park_time  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, fence)
);
CREATE INDEX parked_receipts_time ON metering.parked_receipts (park_time);

-- Evidence that could not be settled, for a person to look at: receipts without a record, and records that the database refused.
CREATE TABLE metering.suspense (
    suspense_no  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id       bytea NOT NULL,
    fence        bigint NOT NULL,
    why          text NOT NULL,
    evidence     bytea NOT NULL,                       -- gpumesh.metering.v1.Settle, encoded
    create_time  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (job_id, fence, why)
);
