"""Generated from `proto/swarm/v1`; run `make proto` to renew."""
