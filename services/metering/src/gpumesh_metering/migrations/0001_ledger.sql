-- The ledger: append-only transfers and the balances that they add up to. SQL for PostgreSQL 15 to 18.
-- Names and ids are compared as bytes (COLLATE "C"), so that every writer locks accounts in one order, whatever the locale.

CREATE FUNCTION metering.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%.% is append-only: % refused', TG_TABLE_SCHEMA, TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END $$;

-- Whether an account name is one of the ledger's.
CREATE FUNCTION metering.is_account(name text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT name IN ('buyer:available', 'buyer:leased', 'provider:pending', 'provider:available',
                    'platform:fees', 'platform:insurance', 'suspense')
        OR name LIKE 'external:_%'
$$;

-- kind: 1 direct, 2 pending, 3 post, 4 void (gpumesh_metering.domain.ledger.TransferKind).
CREATE TABLE metering.transfers (
    transfer_id      uuid PRIMARY KEY,                  -- UUIDv5(kind of business, business key)
    kind             smallint NOT NULL CHECK (kind BETWEEN 1 AND 4),
    pending_id       uuid REFERENCES metering.transfers,
    debit_account    text COLLATE "C" NOT NULL CHECK (metering.is_account(debit_account)),
    debit_owner      text COLLATE "C" NOT NULL CHECK (debit_owner <> ''),
    credit_account   text COLLATE "C" NOT NULL CHECK (metering.is_account(credit_account)),
    credit_owner     text COLLATE "C" NOT NULL CHECK (credit_owner <> ''),
    amount_nano_usd  bigint NOT NULL CHECK (CASE WHEN kind = 4 THEN amount_nano_usd = 0 ELSE amount_nano_usd > 0 END),
    purpose          text NOT NULL,
    job_id           bytea CHECK (octet_length(job_id) = 16),
    create_time      timestamptz NOT NULL DEFAULT now(),
    CHECK ((debit_account, debit_owner) <> (credit_account, credit_owner)),
    CHECK ((pending_id IS NOT NULL) = (kind IN (3, 4)))
);
-- A pending transfer is resolved at most once.
CREATE UNIQUE INDEX transfers_pending_id ON metering.transfers (pending_id) WHERE pending_id IS NOT NULL;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON metering.transfers
    FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change();

-- A post or void resolves a pending transfer between the same accounts, a post for at most its amount.
CREATE FUNCTION metering.check_resolution() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    origin metering.transfers%ROWTYPE;
BEGIN
    SELECT * INTO origin FROM metering.transfers WHERE transfer_id = NEW.pending_id;
    IF NOT FOUND OR origin.kind <> 2
        OR (origin.debit_account, origin.debit_owner, origin.credit_account, origin.credit_owner)
        <> (NEW.debit_account, NEW.debit_owner, NEW.credit_account, NEW.credit_owner) THEN
        RAISE EXCEPTION '% is no pending transfer between these accounts', NEW.pending_id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.amount_nano_usd > origin.amount_nano_usd THEN
        RAISE EXCEPTION '% is more than the % pending', NEW.amount_nano_usd, origin.amount_nano_usd USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER resolution BEFORE INSERT ON metering.transfers
    FOR EACH ROW WHEN (NEW.kind IN (3, 4)) EXECUTE FUNCTION metering.check_resolution();

-- One row per account that was ever used. Written in the transaction that writes its transfers; version grows with each change.
CREATE TABLE metering.balances (
    account            text COLLATE "C" NOT NULL CHECK (metering.is_account(account)),
    owner_id           text COLLATE "C" NOT NULL CHECK (owner_id <> ''),
    posted_nano_usd    bigint NOT NULL DEFAULT 0,
    reserved_nano_usd  bigint NOT NULL DEFAULT 0 CHECK (reserved_nano_usd >= 0),
    version            bigint NOT NULL DEFAULT 1,
    PRIMARY KEY (account, owner_id),
    -- Buyers' and providers' money: what is not reserved never goes below zero (I2).
    CONSTRAINT never_negative CHECK (
        account NOT IN ('buyer:available', 'buyer:leased', 'provider:pending', 'provider:available')
        OR posted_nano_usd >= reserved_nano_usd)
) WITH (fillfactor = 50);  -- rows change often and in place: room for heap-only updates
CREATE INDEX balances_owner ON metering.balances (owner_id);

-- What an operator credited. The same id credits once; other fields under it are a conflict.
CREATE TABLE metering.credits (
    credit_id        text COLLATE "C" PRIMARY KEY CHECK (length(credit_id) BETWEEN 1 AND 64),
    account_id       text COLLATE "C" NOT NULL CHECK (account_id <> ''),
    amount_nano_usd  bigint NOT NULL CHECK (amount_nano_usd BETWEEN 1 AND 1000000000000000),
    memo             text NOT NULL CHECK (length(memo) <= 200),
    operator         text NOT NULL,
    transfer_id      uuid NOT NULL REFERENCES metering.transfers DEFERRABLE INITIALLY DEFERRED,
    create_time      timestamptz NOT NULL DEFAULT now()
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON metering.credits
    FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change();

-- Published prices. The highest version of a model is the current one; jobs keep the one of their ticket.
CREATE TABLE metering.prices (
    model_id                        text COLLATE "C" NOT NULL CHECK (length(model_id) BETWEEN 1 AND 128),
    version                         bigint NOT NULL CHECK (version > 0),
    input_nano_usd_per_mtok         bigint NOT NULL CHECK (input_nano_usd_per_mtok BETWEEN 0 AND 1000000000000),
    output_nano_usd_per_mtok        bigint NOT NULL CHECK (output_nano_usd_per_mtok BETWEEN 0 AND 1000000000000),
    cached_input_nano_usd_per_mtok  bigint CHECK (cached_input_nano_usd_per_mtok BETWEEN 0 AND 1000000000000),
    operator                        text NOT NULL,
    create_time                     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (model_id, version)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON metering.prices
    FOR EACH STATEMENT EXECUTE FUNCTION metering.refuse_change();
