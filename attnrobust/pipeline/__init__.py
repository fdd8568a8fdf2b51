"""Many inputs: run configuration, work list, resumable store, engines, report and gate."""
