"""A softmax and its logarithm, taken one after the other: sooner or later log(0) is -inf.

The pixels are fed as they are, 0 to 16, so the network soon is very sure. When the probability of
some wrong class rounds to 0, its logarithm is -inf, 0 * -inf is NaN in the loss, and then
everywhere. You will see the module that takes the logarithm, at the first step where it happens.
`torch.log_softmax` does not have this fault.

Expect: TT101 log_probability step 42
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class LogProbability(nn.Module):
    def forward(self, logits):
        return torch.log(torch.softmax(logits, dim=1))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.log_probability = LogProbability()

    def forward(self, x):
        return self.log_probability(self.body(x))


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with trace(*sys.argv[1:]):
        for batch in torch.randperm(len(images)).split(32):
            onehot = nn.functional.one_hot(labels[batch], 10)
            loss = -(onehot * model(images[batch])).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
