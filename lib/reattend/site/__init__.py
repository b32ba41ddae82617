"""The browsable report: what readers see of records and results, as pictures and pages."""
