"""The command line: fetch, build, run, repro, report, compare, sync, tidy."""
