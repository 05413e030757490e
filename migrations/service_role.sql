-- What the server's role may do: the ledger can be read and appended to, never
-- changed. Run by `remit migrate --service-role`, with the role's name put in.
GRANT SELECT, INSERT ON ledger, idempotency_keys TO "remit_service";
GRANT SELECT, INSERT, UPDATE ON tenants, heads, budgets, balances, reservations, api_keys, sweeps, documents, approvals TO "remit_service";
GRANT SELECT, INSERT, UPDATE, DELETE ON activity, subscriptions, deliveries TO "remit_service";
GRANT SELECT ON ledger_checkpoints, remit_migrations TO "remit_service";
