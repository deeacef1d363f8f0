"""A run in other formats, one file per format."""
