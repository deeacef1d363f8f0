"""All that touches a live program: the recording half, the only one that imports torch."""
