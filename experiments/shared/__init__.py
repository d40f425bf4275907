"""What several pages share: plots, records and tables, timing, models, problems, and mathematics."""
