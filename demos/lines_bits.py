"""A function in plain Python, told line by line while it runs: no tensor and no fault in it.

You will see each line with its time, each variable when it is new or changed, and what is returned;
the same is in the log: `tensortrace lines log.jsonl`.

Expect: nothing
"""

import sys

from tensortrace import trace


@trace(*sys.argv[1:], lines={"output": "stderr"})
def to_bits(number):
    if not number:
        return [0]
    bits = []
    while number:
        number, remainder = divmod(number, 2)
        bits.insert(0, remainder)
    return bits


if __name__ == "__main__":
    print(to_bits(6))
