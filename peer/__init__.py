"""The volunteer's side: device, data, model, rounds, state and the daemon."""
