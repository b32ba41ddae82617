"""Shared models measured by themselves: one module a model, and what keeps and reads the reports."""
