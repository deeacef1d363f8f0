"""A recurrent network reads the last 16 pixels of each digit, then all 64: its gradient explodes.

Kaiming initialisation is right for a ReLU layer and wrong for a ReLU recurrence: the gradient grows
with every turn, 16 of them are harmless and 64 are not. You will see the norm of the gradient, how
many times it is what it was, soon after the longer sequences begin at step 25.

Expect: TT201 rnn step 27
"""

import sys

import torch
from torch import nn

from tensortrace import trace
from tensortrace.demo import load_digits

WARM_UP = 25


class PixelReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(1, 64, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(64, 10)
        nn.init.kaiming_normal_(self.rnn.weight_hh_l0, nonlinearity="relu")

    def forward(self, pixels):
        states, _ = self.rnn(pixels)
        return self.head(states[:, -1])


def main():
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits())
    pixels = images.flatten(1).unsqueeze(2) / 16
    model = PixelReader()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    with trace(*sys.argv[1:]):
        for step, batch in enumerate(torch.randperm(len(pixels)).split(32)):
            x = pixels[batch] if step >= WARM_UP else pixels[batch, -16:]
            loss = nn.functional.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 8 == 7:
                print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
