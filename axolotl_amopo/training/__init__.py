"""The trainer, and what it logs, saves and reports."""
