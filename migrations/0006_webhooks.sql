-- Who is told of what happens, how far they were told, and what failed.

CREATE TABLE subscriptions (
    tenant_id       text   NOT NULL,
    subscription_id text   NOT NULL,
    url             text   NOT NULL,
    event_types     text   NOT NULL,  -- names divided by ','
    secret          text   NOT NULL,  -- signs what is sent: it has to be known, not only compared
    cursor_seq      bigint NOT NULL,  -- entries up to here were delivered, or tried once
    lease_us        bigint NOT NULL DEFAULT 0,  -- until then one process delivers; also names its turn
    created_us      bigint NOT NULL,
    PRIMARY KEY (tenant_id, subscription_id)
);

-- What failed at first. A row is gone once it was delivered.
CREATE TABLE deliveries (
    tenant_id       text    NOT NULL,
    subscription_id text    NOT NULL,
    seq             bigint  NOT NULL,  -- entry that it is about
    state           text    NOT NULL,  -- RETRY, DEAD
    attempts        integer NOT NULL,
    next_us         bigint  NOT NULL,
    last_error      text    NOT NULL,
    PRIMARY KEY (tenant_id, subscription_id, seq)
);

CREATE INDEX deliveries_by_time ON deliveries (state, next_us);
