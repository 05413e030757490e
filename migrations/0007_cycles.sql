-- Tenants that keep to the rules of the Cycles protocol.

ALTER TABLE tenants
    ADD COLUMN cycles text;  -- JSON; NULL: Remit's own rules
