"""The embedded base models, and how they are made."""
