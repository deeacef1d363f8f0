"""What tracing costs, measured side by side: ``python -m tests.benchmarks --help``.

Nothing here is collected by pytest: a time is a result, never an assertion.
"""
