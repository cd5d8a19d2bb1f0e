"""Metrics of classifiers and detectors."""
