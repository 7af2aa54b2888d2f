"""Where the ledger is kept: one interface, in memory or in SQL, and one conformance suite for all."""
