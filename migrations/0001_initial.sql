-- Every key of what a tenant owns begins with tenant_id: the tenant is the unit
-- of consistency, of the chain and of sharding. There are no foreign keys, no
-- sequences and no triggers, so that distributed engines can run it too; the
-- engine keeps the invariants and `remit verify` checks them.
-- Times are microseconds since 1970-01-01T00:00:00Z.

CREATE TABLE tenants (
    tenant_id              text    PRIMARY KEY,  -- lower case
    display_name           text    NOT NULL,
    state                  text    NOT NULL,     -- ACTIVE, SUSPENDED, CLOSED
    unprovisioned_rule     text    NOT NULL,     -- REQUIRE_TOOLSET_BUDGET, REQUIRE_ANY_BUDGET
    default_overage_policy text    NOT NULL,     -- REJECT, ALLOW_IF_AVAILABLE, ALLOW_WITH_OVERDRAFT
    created_us             bigint  NOT NULL
);

-- One row a tenant, and one for `_remit`: the fence. Whoever writes anything of a
-- tenant moves its fence from the value that was decided upon to the next one.
CREATE TABLE heads (
    tenant_id      text    PRIMARY KEY,
    fence          bigint  NOT NULL,  -- counts writes, from 1
    seq            bigint  NOT NULL,  -- of the last ledger entry, 0 before the first
    hash           bytea   NOT NULL,  -- of the last ledger entry, 32 zero bytes before the first
    time_us        bigint  NOT NULL,  -- of the last ledger entry
    next_balance   bigint  NOT NULL,  -- the number that the next balance gets
    config_version bigint  NOT NULL   -- counts changes of tenants and budgets
) WITH (fillfactor = 50);             -- room to update in place: no column that changes is indexed

CREATE TABLE budgets (
    tenant_id       text    NOT NULL,
    budget_no       integer NOT NULL,  -- from 1
    scope           text    NOT NULL,  -- canonical, may end in wildcards
    unit            text    NOT NULL,
    period          text    NOT NULL,
    time_zone       text    NOT NULL,
    allocation      bigint,            -- NULL: unlimited
    overdraft_limit bigint  NOT NULL,
    carry_over      text    NOT NULL,
    state           text    NOT NULL,  -- ACTIVE, FROZEN, CLOSED
    present         boolean NOT NULL,  -- false once it was taken away
    limit_seq       bigint  NOT NULL,  -- entry that last changed allocation or overdraft limit
    created_us      bigint  NOT NULL,
    PRIMARY KEY (tenant_id, budget_no)
);

CREATE TABLE balances (
    tenant_id       text    NOT NULL,
    balance_no      bigint  NOT NULL,  -- from 1
    budget_no       integer NOT NULL,
    scope           text    NOT NULL,  -- the budget's, wildcards filled in
    scope_key       bytea   NOT NULL,  -- first 16 bytes of SHA-256 of scope: an index entry has a bounded size
    period_start_us bigint  NOT NULL,  -- 0 for TOTAL
    period_end_us   bigint,            -- NULL for TOTAL
    granted         bigint  NOT NULL,  -- beside the budget's allocation; may be negative
    reserved        bigint  NOT NULL CHECK (reserved >= 0),
    spent           bigint  NOT NULL CHECK (spent >= 0),
    debt            bigint  NOT NULL CHECK (debt >= 0),
    over_limit_seq  bigint,            -- entry by which a use was capped here; NULL: none
    credits         text,              -- JSON, expiring credits, soonest first; NULL: none
    next_lapse_us   bigint,            -- lower bound for the end of the next hold; NULL: nothing is held
    PRIMARY KEY (tenant_id, balance_no),
    UNIQUE (tenant_id, budget_no, scope_key, period_start_us)
) WITH (fillfactor = 50);

CREATE TABLE reservations (
    tenant_id      text    NOT NULL,
    reservation_id bytea   NOT NULL,  -- 16 bytes, derived from the idempotency key of its Reserve
    version        integer NOT NULL,  -- counts changes, from 1
    state          text    NOT NULL,  -- ACTIVE, COMMITTED, RELEASED, EXPIRED
    scope          text    NOT NULL,  -- all that the subject names, canonical
    body           text    NOT NULL,  -- JSON: subject, action, overage policy, metadata
    holds          text    NOT NULL,  -- JSON: tranches
    created_us     bigint  NOT NULL,
    reserve_seq    bigint  NOT NULL,  -- entry that made it
    expires_us     bigint  NOT NULL,
    lapses_us      bigint  NOT NULL,  -- end of the grace: from then on it is swept
    settled_us     bigint,            -- NULL while ACTIVE
    settle_seq     bigint,            -- entry that settled it; NULL while ACTIVE
    charged        text,              -- JSON: COMMITTED, by unit
    PRIMARY KEY (tenant_id, reservation_id)
) WITH (fillfactor = 70);

-- For the sweeper. Without `state`, so that settling can update in place.
CREATE INDEX reservations_by_lapse ON reservations (lapses_us);

-- Answers of requests other than Reserve by their idempotency key.
CREATE TABLE idempotency_keys (
    tenant_id text   NOT NULL,
    key_hash  bytea  NOT NULL,  -- 16 bytes of SHA-256 over tenant, method and key
    seq       bigint NOT NULL,  -- entry that recorded the answer
    PRIMARY KEY (tenant_id, key_hash)
);

CREATE TABLE ledger (
    tenant_id      text   NOT NULL,
    seq            bigint NOT NULL,  -- from 1 without a gap
    time_us        bigint NOT NULL,
    kind           text   NOT NULL,
    decision       text,             -- NULL: nothing was decided
    reservation_id bytea,            -- NULL: about none
    body           text   NOT NULL,  -- canonical JSON, the bytes that are hashed
    prev_hash      bytea  NOT NULL,
    hash           bytea  NOT NULL,
    PRIMARY KEY (tenant_id, seq)
);

CREATE TABLE api_keys (
    key_id         text   PRIMARY KEY,
    tenant_id      text   NOT NULL,  -- `_remit`: an operator's
    display_name   text   NOT NULL,
    permissions    text   NOT NULL,  -- names divided by ','
    subject_prefix text,             -- NULL: not confined
    secret_sha256  bytea  NOT NULL,
    expires_us     bigint,           -- NULL: never
    created_us     bigint NOT NULL,
    revoked_us     bigint            -- NULL: in force
);

CREATE INDEX api_keys_by_tenant ON api_keys (tenant_id, created_us, key_id);
