"""A run in other formats, one file per format; `exporter` says how a new one is added."""
