"""A mask of the wrong dtype: the function ends by an exception.

You will see which tensors the line had when it raised, with their dtypes; the exception goes on
as it would without tracing.

Expect: TT801 masked_scatter_ step 0
"""

import sys

import torch

from tensortrace import trace


@trace(*sys.argv[1:], lines={"output": "stderr", "normalize": True})
def scatter(mask, values):
    result = torch.zeros(6)
    result.masked_scatter_(mask, values)
    return result


def main():
    mask = torch.tensor([0, 1, 0, 1, 1, 0])
    print(scatter(mask, torch.tensor([5.0, 6.0, 7.0])))


if __name__ == "__main__":
    main()
