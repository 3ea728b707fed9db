-- Who and what. Ids are made by callers and never reused; secrets are stored as SHA-256 only.

CREATE TABLE registry.accounts (
    account_id  text PRIMARY KEY CHECK (account_id ~ '^acct_[a-z0-9_]{1,40}$'),
    name        text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    suspended   boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL DEFAULT now(),
    position    bigint GENERATED ALWAYS AS IDENTITY UNIQUE
);
CREATE INDEX accounts_suspended ON registry.accounts (account_id) WHERE suspended;

CREATE TABLE registry.keys (
    key_id      text PRIMARY KEY CHECK (key_id ~ '^[a-zA-Z0-9]{1,32}$'),
    account_id  text NOT NULL REFERENCES registry.accounts,
    name        text NOT NULL CHECK (length(name) <= 100),
    key_sha256  bytea NOT NULL CHECK (length(key_sha256) = 32),
    create_time timestamptz NOT NULL DEFAULT now(),
    revoke_time timestamptz
);
CREATE INDEX keys_by_account ON registry.keys (account_id, create_time DESC);
CREATE INDEX keys_revoked ON registry.keys (revoke_time) WHERE revoke_time IS NOT NULL;

CREATE TABLE registry.providers (
    provider_id text PRIMARY KEY CHECK (provider_id ~ '^prov_[a-z0-9_]{1,40}$'),
    name        text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    create_time timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE registry.nodes (
    node_id           text PRIMARY KEY,
    provider_id       text NOT NULL REFERENCES registry.providers,
    public_key_sha256 bytea NOT NULL CHECK (length(public_key_sha256) = 32),
    create_time       timestamptz NOT NULL DEFAULT now(),
    renew_time        timestamptz,
    revoke_time       timestamptz
);
CREATE INDEX nodes_by_provider ON registry.nodes (provider_id);
CREATE INDEX nodes_revoked ON registry.nodes (revoke_time) WHERE revoke_time IS NOT NULL;

CREATE TABLE registry.enrolment_tokens (
    token_sha256 bytea PRIMARY KEY CHECK (length(token_sha256) = 32),
    provider_id  text NOT NULL REFERENCES registry.providers,
    create_time  timestamptz NOT NULL DEFAULT now(),
    expire_time  timestamptz NOT NULL,
    node_id      text UNIQUE REFERENCES registry.nodes
);

CREATE TABLE registry.tokenizers (
    tokenizer_sha256 text PRIMARY KEY CHECK (tokenizer_sha256 ~ '^[0-9a-f]{64}$'),
    size_bytes       integer NOT NULL CHECK (size_bytes BETWEEN 1 AND 33554432),
    content          bytea NOT NULL,
    create_time      timestamptz NOT NULL DEFAULT now()
);
-- Uncompressed outside the row: a piece is read without reading the whole.
ALTER TABLE registry.tokenizers ALTER COLUMN content SET STORAGE EXTERNAL;

CREATE TABLE registry.models (
    model_id                 text PRIMARY KEY,
    revision                 text NOT NULL,
    aliases                  text[] NOT NULL,
    context_tokens           bigint NOT NULL CHECK (context_tokens > 0),
    licence                  text NOT NULL,
    modalities               integer[] NOT NULL,
    features                 integer[] NOT NULL,
    quantisation             text NOT NULL,
    tokenizer_sha256         text REFERENCES registry.tokenizers,
    max_output_tokens        bigint NOT NULL CHECK (max_output_tokens >= 0),
    owner                    text NOT NULL,
    template_overhead_tokens bigint NOT NULL CHECK (template_overhead_tokens >= 0),
    create_time              timestamptz NOT NULL DEFAULT now()
);

-- Every name under which a model is found, its id included: one name, one model.
CREATE TABLE registry.model_names (
    name     text PRIMARY KEY,
    model_id text NOT NULL REFERENCES registry.models ON DELETE CASCADE
);
CREATE INDEX model_names_by_model ON registry.model_names (model_id);

-- Every process that serves the directory listens on this channel; the payload names the part to read again.
-- A trigger, so that no writer can forget it, not even a person with psql.
CREATE FUNCTION registry.announce() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('registry_directory', TG_ARGV[0]);
    RETURN NULL;
END
$$;

CREATE TRIGGER announce_keys AFTER UPDATE OR DELETE ON registry.keys
    FOR EACH STATEMENT EXECUTE FUNCTION registry.announce('keys');
CREATE TRIGGER announce_accounts AFTER UPDATE OR DELETE ON registry.accounts
    FOR EACH STATEMENT EXECUTE FUNCTION registry.announce('accounts');
CREATE TRIGGER announce_nodes AFTER UPDATE OF revoke_time OR DELETE ON registry.nodes
    FOR EACH STATEMENT EXECUTE FUNCTION registry.announce('nodes');
CREATE TRIGGER announce_models AFTER INSERT OR UPDATE OR DELETE ON registry.models
    FOR EACH STATEMENT EXECUTE FUNCTION registry.announce('models');
