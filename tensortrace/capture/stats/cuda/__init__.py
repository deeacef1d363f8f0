"""Statistics on a GPU: nothing waits for the device until the gate, and there once.

`launch` starts the Triton programs of `kernel` on the streams that `driver` knows; `rows` holds
what they have measured until it is copied.
"""
