INSERT INTO ledger
SELECT tenant_id, seq, time_us, kind, decision, reservation_id, body, prev_hash, hash
FROM ledger_unpartitioned;

DROP TABLE ledger_unpartitioned;
