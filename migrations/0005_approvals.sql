-- What waits for a person, and how it ended; who may decide; budgets that ask a person
-- where they have not enough.

CREATE TABLE approvals (
    tenant_id      text   NOT NULL,
    reservation_id bytea  NOT NULL,  -- the reservation that waits
    state          text   NOT NULL,  -- PENDING, APPROVED, REJECTED, EXPIRED, WITHDRAWN
    deadline_us    bigint NOT NULL,  -- from then on it counts as denied
    requested_us   bigint NOT NULL,
    reserve_seq    bigint NOT NULL,  -- entry that asked
    body           text   NOT NULL,  -- JSON: approvers, lease, who asked
    resolved_us    bigint,           -- NULL while PENDING
    resolved_by    text,             -- API key; NULL: nobody
    approver       text,             -- the person, as the approver's side names them
    note           text,
    resolve_seq    bigint,           -- entry that ended it
    PRIMARY KEY (tenant_id, reservation_id)
);

-- What waits, soonest deadline first.
CREATE INDEX approvals_by_deadline ON approvals (tenant_id, state, deadline_us, reservation_id);

ALTER TABLE budgets
    ADD COLUMN on_exceeded text;  -- JSON; NULL: denied

ALTER TABLE api_keys
    ADD COLUMN approver_groups text NOT NULL DEFAULT '';  -- names divided by ','
