"""What runs and sweeps recorded, to look at: one HTML page, Markdown tables, figures."""
