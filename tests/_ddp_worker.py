"""What one of several processes does with a model replicated by DistributedDataParallel."""

import os
import warnings

import torch
import torch.distributed as dist
from _launch import STEADY, batches, differs_between_ranks, mine, work
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from recipes.processes import Processes
from snr_hooks import SNROptimizer

LAMBDA = 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.hidden = nn.Linear(6 * 4 * 4, 7)
        self.head = nn.Linear(7, 3)
        self.extra = nn.Linear(7, 3)

    def forward(self, x, *, extra=True):
        h = self.hidden(self.conv(x).tanh().flatten(1)).tanh()
        return self.head(h) + (self.extra(h) if extra else 0)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def loss(model, x, step, **options):
    return (model(x, **options) - 0.01 * step).square().mean()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def plain_loop(model, opt, n_steps, part):
    for step, x in zip(range(n_steps), batches(), strict=False):
        opt.zero_grad()
        loss(model, part(x), step).backward()
        opt.step()


def accumulating_loop(model, opt, n_steps, part):
    """Three micro-batches a step, of which the first two are not communicated."""
    for step, x in zip(range(n_steps), batches(), strict=False):
        opt.zero_grad()
        for i, micro_batch in enumerate(x.chunk(3)):
            local = i < 2 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if local else torch.enable_grad():
                (loss(model, part(micro_batch), step) / 3).backward()
        opt.step()


def clipping_loop(model, opt, n_steps, part):
    for step, x in zip(range(n_steps), batches(), strict=False):
        opt.zero_grad()
        loss(model, part(x), step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()


def distance(model, reference):
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def state(model, opt):
    """Parameters, buffers and vectors, or sigma where only one rank has a state dict."""
    if isinstance(opt.optimizer, ZeroRedundancyOptimizer):
        norms = {name: torch.tensor(sigma) for name, sigma in opt.spectral_norms().items()}
        return dict(model.state_dict()) | norms
    entries = opt.state_dict()["snr_hooks"]["vectors"]
    vectors = {f"{name} {side}": v for name, pair in entries.items() for side, v in pair.items()}
    return dict(model.state_dict()) | vectors


def trajectories(folder):
    """50 steps against a single process on the joined batch."""
    cases = {
        "plain": (plain_loop, {}, sgd),
        "accumulating": (accumulating_loop, {}, sgd),
        "accumulating_in_views": (accumulating_loop, {"gradient_as_bucket_view": True}, sgd),
        "clipping": (clipping_loop, {"gradient_as_bucket_view": True}, sgd),
        "static_graph": (plain_loop, {"static_graph": True}, sgd),
        "small_buckets": (plain_loop, {"bucket_cap_mb": 1e-4}, sgd),
        "find_unused": (plain_loop, {"find_unused_parameters": True}, sgd),
        "zero": (plain_loop, {}, lambda parameters: zero(parameters)),
        "operators": (plain_loop, {}, sgd),
        "decoupled": (accumulating_loop, {}, sgd),
        "default": (plain_loop, {}, sgd),
    }
    wrapping = {"operators": {"choose": "operator"}, "decoupled": {"decoupled": True}}
    wrapping = {name: STEADY | wrapping.get(name, {}) for name in cases} | {"default": {}}
    found = {}
    for name, (loop, options, make) in cases.items():
        reference, unregularized = network(), network()
        how = wrapping[name]
        base = sgd(reference.parameters())
        loop(reference, SNROptimizer(base, reference, LAMBDA, **how), 50, whole)
        loop(unregularized, sgd(unregularized.parameters()), 50, whole)
        model = network()
        replica = DistributedDataParallel(model, **options)
        # Over the replica or the model inside: it is the same.
        wrapped = replica if "find" in name else model
        opt = SNROptimizer(make(replica.parameters()), wrapped, LAMBDA, **how)
        loop(replica, opt, 50, mine)
        found[name] = {
            "from_reference": distance(model, reference),
            "from_plain": distance(model, unregularized),
            "differing": differs_between_ranks(state(model, opt)),
            "targets": [target.name for target in opt.targets],
        }
    return found


def whole(x):
    return x


def zero(parameters):
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)


def wrapped_first(folder):
    """Wrapping the optimizer before DDP."""
    reference, model = network(), network()
    base = sgd(reference.parameters())
    plain_loop(reference, SNROptimizer(base, reference, LAMBDA, **STEADY), 20, whole)
    opt = SNROptimizer(sgd(model.parameters()), model, LAMBDA, **STEADY)
    plain_loop(DistributedDataParallel(model), opt, 20, mine)
    return {"from_reference": distance(model, reference)}


def compressed(folder):
    """A communication hook that rounds gradients to bfloat16 rounds the term with them."""
    found = {}
    gradients = []
    for strength in (0.0, 10.0):
        model = network(torch.float32)
        replica = DistributedDataParallel(model)
        replica.register_comm_hook(None, bf16_compress_hook)
        opt = SNROptimizer(sgd(model.parameters()), model, strength, exact=True)
        loss(replica, mine(next(batches(torch.float32))), 0).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    terms = torch_terms(network(torch.float32))
    for name, term in terms.items():
        added = (gradients[1][name] - gradients[0][name]).double() / 10.0
        found[name] = ((added - term).norm() / term.norm()).item()
    model = network(torch.float32)
    replica = DistributedDataParallel(model)
    replica.register_comm_hook(None, bf16_compress_hook)
    opt = SNROptimizer(sgd(model.parameters()), model, LAMBDA)
    for step, x in zip(range(50), batches(torch.float32), strict=False):
        opt.zero_grad()
        loss(replica, mine(x), step).backward()
        opt.step()
    return {"errors": found, "differing": differs_between_ranks(state(model, opt))}


def torch_terms(model):
    """sigma u v^T of each weight, by SVD."""
    terms = {}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            u, s, vh = torch.linalg.svd(p.detach().double().flatten(1), full_matrices=False)
            terms[name] = (s[0] * u[:, 0, None] * vh[0]).view(p.shape)
    return terms


def unused_on_some_ranks(folder):
    """A weight that only rank 0 uses gets its term averaged with the zeros of the others."""
    gradients = []
    for strength in (0.0, 1.0):
        model = network()
        replica = DistributedDataParallel(model, find_unused_parameters=True)
        opt = SNROptimizer(sgd(model.parameters()), model, strength, exact=True)
        x = mine(next(batches()))
        loss(replica, x, 0, extra=dist.get_rank() == 0).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    shares = {}
    for name, term in torch_terms(network()).items():
        added = gradients[1][name] - gradients[0][name]
        shares[name] = ((added * term).sum() / (term * term).sum()).item()

    # And with iteration, vectors stay the same everywhere.
    model = network()
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    opt = SNROptimizer(sgd(model.parameters()), model, LAMBDA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, x in zip(range(20), batches(), strict=False):
            opt.zero_grad()
            loss(replica, mine(x), step, extra=(dist.get_rank() + step) % 2 == 0).backward()
            opt.step()
    return {
        "shares": shares,
        "differing": differs_between_ranks(state(model, opt)),
        "warnings": [str(warning.message) for warning in caught],
    }


def joined(folder):
    """Ranks with different numbers of batches, under DDP's join."""
    model = network()
    replica = DistributedDataParallel(model)
    opt = SNROptimizer(sgd(model.parameters()), model, LAMBDA)
    n = 5 + dist.get_rank()
    with Join([replica]):
        for step, x in zip(range(n), batches(), strict=False):
            opt.zero_grad()
            loss(replica, mine(x), step).backward()
            opt.step()
    return {"steps": n, "differing": differs_between_ranks(dict(model.state_dict()))}


def resumed(folder):
    """Save on rank 0 after 5 steps, load everywhere, continue; with two, bitwise as without."""
    options = {} if dist.get_world_size() == 2 else STEADY  # more add up in another order
    model = network()
    opt = SNROptimizer(sgd(model.parameters()), model, LAMBDA, **options)
    replica = DistributedDataParallel(model)
    plain_loop(replica, opt, 5, mine)
    if dist.get_rank() == 0:
        torch.save([model.state_dict(), opt.state_dict()], folder / "resumed.pt")
    dist.barrier()
    other = network()
    restored = SNROptimizer(sgd(other.parameters()), other, LAMBDA, seed=3, **options)
    states = torch.load(folder / "resumed.pt", weights_only=True)
    other.load_state_dict(states[0])
    restored.load_state_dict(states[1])
    plain_loop(replica, opt, 5, mine)
    plain_loop(DistributedDataParallel(other), restored, 5, mine)
    return {"distance": distance(model, other)}


def averaged(folder):
    """Running statistics of the recipe's batch norms after an epoch."""
    model = nn.BatchNorm1d(1)
    model.running_mean.fill_(float(dist.get_rank()))
    Processes(dist.get_rank(), dist.get_world_size()).average_batch_norms(model)
    return model.running_mean.item()


SCENARIOS = [trajectories, unused_on_some_ranks, resumed, averaged]

if __name__ == "__main__":
    two = os.environ["WORLD_SIZE"] == "2"
    work(SCENARIOS + [wrapped_first, compressed, joined] * two)
