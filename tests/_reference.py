"""The slow obvious twin: the same training with the penalty written into the loss."""

import torch
from _oracles import penalty


def train(model, optimizer, n_steps, *, n_micro_batches=1, max_norm=None, strengths=None):
    """Train on the model's example; ``strengths`` adds the penalty to the first micro-batch."""
    micro_batches = model.example.chunk(n_micro_batches)
    for step in range(n_steps):
        optimizer.zero_grad()
        for i, x in enumerate(micro_batches):
            target = torch.full((), 0.1 * step, dtype=x.dtype)
            loss = (model(x) - target).square().mean() / n_micro_batches
            if strengths and i == 0:
                loss = loss + penalty(model, strengths)
            loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True)
        optimizer.step()
