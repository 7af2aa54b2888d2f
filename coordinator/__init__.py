"""The coordinator: admission, ledger, credits, web page and metrics. No tensor ever passes through it."""
