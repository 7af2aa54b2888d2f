"""One file a promise: what happens to the others when something happens to one peer."""
