"""Model cards written from a plan and a report."""
