"""What a person looks at: tables, plots, the report page, and the gate."""
