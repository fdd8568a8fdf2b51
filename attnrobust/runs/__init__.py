"""Many inputs: configuration, work list, rows, resumable store, engines."""
