-- What beside budgets decides: what a tenant says of its tools and rules, what a budget
-- leaves the more of it is used, and what agents did of late.

ALTER TABLE tenants
    ADD COLUMN unknown_action    text,                          -- JSON; NULL: denied once a tool is listed
    ADD COLUMN activity_window_s integer NOT NULL DEFAULT 600,  -- how long what an agent did counts as of late
    ADD COLUMN keep_arguments    text;                          -- JSON; NULL: only their hash is kept

ALTER TABLE budgets
    ADD COLUMN thresholds text;  -- JSON, rising; NULL: none

-- One document of each kind, replaced as a whole.
CREATE TABLE documents (
    tenant_id text   NOT NULL,  -- `_remit`: for all tenants
    kind      text   NOT NULL,  -- CATALOGUE, POLICY, FREEZES
    version   bigint NOT NULL,  -- counts its changes, from 1
    body      text   NOT NULL,  -- JSON, as in the ledger's entry about it
    PRIMARY KEY (tenant_id, kind)
);

-- Counts in a sliding window, where a rule reads them. Rows that have left every window
-- are deleted by the sweeper.
CREATE TABLE activity (
    tenant_id    text   NOT NULL,
    activity_key bytea  NOT NULL,  -- 16 bytes of SHA-256 over agent and action
    last_us      bigint NOT NULL,  -- when something last happened
    body         text   NOT NULL,  -- JSON
    PRIMARY KEY (tenant_id, activity_key)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05);
