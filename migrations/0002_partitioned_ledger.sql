-- The ledger by months, so that old ones can be detached and archived; what changes
-- of a reservation last in its row, so that a settlement logs only that; when the hot
-- tables are vacuumed; where the sweeper goes on. `remit migrate` makes the months (`store/partitions.rs`), then
-- moves the rows (0003).

ALTER TABLE ledger RENAME TO ledger_unpartitioned;
ALTER INDEX ledger_pkey RENAME TO ledger_unpartitioned_pkey;

CREATE TABLE ledger (
    tenant_id      text   NOT NULL,
    seq            bigint NOT NULL,  -- from 1 without a gap; the fence keeps it unique over all partitions
    time_us        bigint NOT NULL,  -- never smaller than that of the entry before
    kind           text   NOT NULL,
    decision       text,             -- NULL: nothing was decided
    reservation_id bytea,            -- NULL: about none
    body           text   NOT NULL,  -- canonical JSON, the bytes that are hashed
    prev_hash      bytea  NOT NULL,
    hash           bytea  NOT NULL,
    PRIMARY KEY (tenant_id, seq, time_us)
) PARTITION BY RANGE (time_us);

-- Nothing is refused for want of a month.
CREATE TABLE ledger_default PARTITION OF ledger DEFAULT;

-- Where chains were archived up to: the rest is verified from here.
CREATE TABLE ledger_checkpoints (
    tenant_id text   NOT NULL,
    seq       bigint NOT NULL,  -- of the last archived entry
    time_us   bigint NOT NULL,  -- of that entry
    hash      bytea  NOT NULL,  -- of that entry
    made      text   NOT NULL,  -- JSON: settings, budgets and balances as the entries left them
    PRIMARY KEY (tenant_id, seq)
);

ALTER TABLE reservations RENAME TO reservations_unordered;
ALTER INDEX reservations_pkey RENAME TO reservations_unordered_pkey;
ALTER INDEX reservations_by_lapse RENAME TO reservations_unordered_by_lapse;

CREATE TABLE reservations (
    tenant_id      text    NOT NULL,
    reservation_id bytea   NOT NULL,  -- 16 bytes, derived from the idempotency key of its Reserve
    scope          text    NOT NULL,  -- all that the subject names, canonical
    body           text    NOT NULL,  -- JSON: subject, action, overage policy, metadata
    created_us     bigint  NOT NULL,
    reserve_seq    bigint  NOT NULL,  -- entry that made it
    -- What changes, together: the log of an update holds only what stands between the
    -- parts that stay equal.
    version        integer NOT NULL,  -- counts changes, from 1
    state          text    NOT NULL,  -- ACTIVE, COMMITTED, RELEASED, EXPIRED
    holds          text    NOT NULL,  -- JSON: tranches
    expires_us     bigint  NOT NULL,
    lapses_us      bigint  NOT NULL,  -- end of the grace: from then on it is swept
    settled_us     bigint,            -- NULL while ACTIVE
    settle_seq     bigint,            -- entry that settled it; NULL while ACTIVE
    charged        text,              -- JSON: COMMITTED, by unit
    PRIMARY KEY (tenant_id, reservation_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

-- For the sweeper. Without `state`, so that settling can update in place.
CREATE INDEX reservations_by_lapse ON reservations (lapses_us);

INSERT INTO reservations
SELECT tenant_id, reservation_id, scope, body, created_us, reserve_seq, version, state, holds,
       expires_us, lapses_us, settled_us, settle_seq, charged
FROM reservations_unordered;

DROP TABLE reservations_unordered;

-- How far sweepers came, so that a server that starts goes on there.
CREATE TABLE sweeps (
    name     text   PRIMARY KEY,  -- lapsed
    until_us bigint NOT NULL
);

-- Small tables of which every row changes all the time. Updates in place clean up after
-- themselves; vacuum is for what they can't reach, so it comes by number, not by share.
ALTER TABLE heads SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
ALTER TABLE balances SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
