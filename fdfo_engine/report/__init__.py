"""The run's report: one HTML file that opens offline."""
