"""Images are compared with one prototype for each class by their angle; one prototype is an image.

The cosine of a vector with itself is 1, its angle is 0, and both are finite. The slope of acos at 1
is infinite. You will see acos inside the module, in the backward pass of the first step.

Expect: TT102 angles step 0
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits


class Angles(nn.Module):
    def __init__(self, prototypes):
        super().__init__()
        self.prototypes = nn.Parameter(prototypes)

    def forward(self, x):
        a, b = (nn.functional.normalize(v, dim=1) for v in (x, self.prototypes))
        cosine = (a @ b.T).clamp(-1, 1)
        return torch.acos(cosine)


class Classifier(nn.Module):
    def __init__(self, prototypes):
        super().__init__()
        self.angles = Angles(prototypes)
        self.scale = nn.Parameter(torch.tensor(-5.0))

    def forward(self, x):
        return self.scale * self.angles(x.flatten(1))


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    first = [int((labels == label).nonzero()[0]) for label in range(10)]
    model = Classifier(images[first].flatten(1).clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with trace(*sys.argv[1:]):
        for batch in torch.arange(len(images)).split(32)[:20]:
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"last loss: {loss:.3f}")


if __name__ == "__main__":
    main()
