"""An engine for many users at once: a scheduler that batches, and the HTTP interface to it."""
