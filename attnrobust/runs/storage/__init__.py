"""Rows on disk: whole files, Parquet parts, the store of a run, exports."""
