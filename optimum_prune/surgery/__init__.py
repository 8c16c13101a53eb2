"""Decisions as data, and the only place that changes a shape or a config."""
