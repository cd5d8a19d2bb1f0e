"""Metrics of classifiers, segmenters, detectors and prompted masks."""
