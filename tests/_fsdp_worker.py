"""What one of several processes does with a model sharded by ``fully_shard`` (FSDP2)."""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _launch import STEADY, batches, differs_between_ranks, mine, work
from _oracles import exact_terms
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from snr_hooks import SNROptimizer, audit, discover

LAMBDA = 0.05


class Net(nn.Module):
    """Linear maps of every kind, some with fewer rows than there are processes."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.up = nn.ConvTranspose2d(5, 3, 2)
        self.hidden = nn.Linear(3 * 5 * 5, 7)
        self.norm = nn.LayerNorm(7)
        self.narrow = nn.Linear(7, 1)
        self.head = nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        h = self.norm(self.hidden(self.up(self.conv(x).tanh()).tanh().flatten(1)))
        return self.head(torch.cat([h, self.narrow(h)], 1))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Net(dtype)


def shard(model, **options):
    for layer in (model.hidden, model.up):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def loss(model, x, step=0):
    return (model(x) - 0.1 * step).square().mean()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, opt, n_steps, *, part=lambda x: x, first=0, clip=None):
    for step, x in zip(range(n_steps), batches(), strict=False):
        if step < first:
            continue
        opt.zero_grad()
        loss(model, part(x), step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


def distance(sharded, reference):
    """The largest difference between a sharded model and one that is not."""
    pairs = zip(sharded.parameters(), reference.parameters(), strict=True)
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs)


def vectors(opt):
    entries = opt.state_dict()["snr_hooks"]["vectors"]
    return {f"{name}.{key}": v for name, entry in entries.items() for key, v in entry.items()}


def trajectories(folder):
    found = {}
    cases = {
        "default": (sgd, {}, {}),
        "clipped": (sgd, {}, {"clip": 0.3}),
        "adamw": (adamw, {}, {}),
        "one_vector": (sgd, {"n_vectors": 1}, {}),
        "iteration": (sgd, {"n_power_iterations": 1.0, "n_vectors": 3}, {}),
        "every_other_step": (sgd, {"n_power_iterations": 0.25}, {}),
        "exact": (sgd, {"exact": True}, {}),
        "decoupled": (adamw, {"decoupled": True, "lambda_": 0.5}, {}),
        "two_values": (sgd, {"choose": {"*": {"top": 2, "penalty": {"hinge": 0.1}}}}, {}),
    }
    for name, (make, options, loop) in cases.items():
        reference, plain, sharded = network(), network(), shard(network())
        options = {"lambda_": LAMBDA} | STEADY | options
        train(reference, SNROptimizer(make(reference), reference, **options), 20, **loop)
        train(plain, make(plain), 20, **loop)
        opt = SNROptimizer(make(sharded), sharded, **options)
        train(sharded, opt, 20, part=mine, **loop)
        found[name] = {
            "from_reference": distance(sharded, reference),
            "from_plain": distance(sharded, plain),
            "differing": differs_between_ranks(vectors(opt)),
            "targets": [target.name for target in opt.targets],
        }
    return found


def layouts(folder):
    """Other ways to shard: along dimension 1, and replicated over one dimension of a mesh."""
    found = {}
    n = dist.get_world_size()
    reference = network()
    train(reference, SNROptimizer(sgd(reference), reference, LAMBDA, **STEADY), 20)

    def along_columns(parameter):
        even = parameter.ndim > 1 and parameter.shape[1] % n == 0
        return Shard(1) if even else None

    cases = {"along_columns": {"shard_placement_fn": along_columns}}
    if n == 4:
        cases["replicated"] = {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))}
    for name, options in cases.items():
        sharded = shard(network(), **options)
        train(sharded, SNROptimizer(sgd(sharded), sharded, LAMBDA, **STEADY), 20, part=mine)
        placements = {str(p.placements) for p in sharded.parameters()}
        found[name] = {
            "from_reference": distance(sharded, reference),
            "placements": sorted(placements),
        }
    return found


def terms(folder):
    """What a backward pass adds to the gradients, against exact SVD of the gathered weights."""
    found = {}
    policies = {
        "float64": (torch.float64, None),
        "bfloat16": (
            torch.float32,
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        ),
        "reduced_in_bfloat16": (
            torch.float32,
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
        ),
    }
    for name, (dtype, policy) in policies.items():
        options = {} if policy is None else {"mp_policy": policy}
        model = shard(network(dtype), **options)
        opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=400, n_vectors=4)
        x = mine(next(batches(dtype)))
        gradients = []
        for wrapped in (True, False):
            if not wrapped:
                opt.remove()
            model.zero_grad()
            # The loss is small beside the term, whose rounding is what is looked at.
            (loss(model, x) * 1e-3).backward()
            gradients.append({n: p.grad.full_tensor() for n, p in model.named_parameters()})
        whole = network(dtype)
        exact = exact_terms(whole, [n for n, p in whole.named_parameters() if p.ndim > 1])
        found[name] = {}
        for parameter, (sigma, term) in exact.items():
            added = (gradients[0][parameter] - gradients[1][parameter]).double() / LAMBDA
            found[name][parameter] = ((added - term).norm() / sigma).item()
    return found


def accumulation(folder):
    """Micro-batches without communication, and a reset of gradients without a step."""
    reference, sharded = network(), shard(network())
    SNROptimizer(sgd(reference), reference, LAMBDA)
    opts = [SNROptimizer(sgd(model), model, LAMBDA, **STEADY) for model in (reference, sharded)]
    for step, x in zip(range(10), batches(), strict=False):
        for model, opt, part in zip((reference, sharded), opts, (lambda x: x, mine), strict=True):
            opt.zero_grad()
            halves = x.chunk(2)
            for i, half in enumerate(halves):
                if model is sharded:
                    sharded.set_requires_gradient_sync(i == 1 or step % 2 == 0)
                (loss(model, part(half), step) / 2).backward()
            if step == 3:
                model.zero_grad()  # and the step begins anew
                loss(model, part(x), step).backward()
            opt.step()
    return distance(sharded, reference)


def communication(folder):
    """Calls and bytes of every collective in a step, without and with regularization."""
    found = {}
    for name in ("plain", "regularized"):
        model = shard(network(torch.float32))
        opt = sgd(model)
        if name == "regularized":
            opt = SNROptimizer(opt, model, LAMBDA)
        steps = []
        data = batches(torch.float32)
        for step in range(4):
            x = mine(next(data))
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                opt.zero_grad()
                loss(model, x).backward()
                opt.step()
            if step < 2:  # the first steps set up, and warm the vectors up
                continue
            calls = {}
            for event in profiler.events():
                if event.name.startswith("gloo:"):
                    sizes = [s for s in event.input_shapes if s]
                    calls.setdefault(event.name, []).append(
                        sum(torch.Size(s).numel() for s in sizes) * 4
                    )
            steps.append(calls)
        found[name] = steps
    shapes = [target.view.shape(target.parameter) for target in opt.targets]
    found["outputs"] = sum(min(3, m, n) * m for m, n in shapes)
    found["inputs"] = sum(min(3, m, n) * n for m, n in shapes)
    found["smallest_weight"] = min(t.parameter.numel() for t in opt.targets)
    return found


def norms(folder):
    """Estimates and the audit of a sharded model, beside those of a whole one."""
    model, whole = shard(network()), network()
    opt = SNROptimizer(sgd(model), model, LAMBDA, **STEADY)
    other = SNROptimizer(sgd(whole), whole, LAMBDA, **STEADY)
    ours, theirs = opt.spectral_norms(), other.spectral_norms()
    return {
        "difference": max(abs(ours[name] - theirs[name]) for name in theirs),
        "audit": [str(audit(opt)).splitlines(), str(audit(other)).splitlines()],
        "described": opt.targets[0].view.describe(opt.targets[0].parameter),
    }


def refused(folder):
    """The errors for sharding after wrapping, and for FSDP1."""
    found = {}
    model = network()
    opt = SNROptimizer(sgd(model), model, LAMBDA)
    shard(model)
    before = [p.detach().full_tensor().clone() for p in model.parameters()]
    loss(model, mine(next(batches()))).backward()
    found["wrapped before fully_shard"] = message(opt.step)
    pairs = zip(before, model.parameters(), strict=True)
    found["unchanged"] = all(torch.equal(b, p.full_tensor()) for b, p in pairs)
    found["operator"] = message(lambda: discover(model, choose="operator"))
    for original in (True, False):
        model = FullyShardedDataParallel(
            network(), use_orig_params=original, device_id=torch.device("cpu")
        )
        found[f"FSDP1 {original}"] = message(lambda m=model: SNROptimizer(sgd(m), m, LAMBDA))
        inner = network()
        opt = SNROptimizer(sgd(inner), inner, LAMBDA)
        model = FullyShardedDataParallel(
            inner, use_orig_params=original, device_id=torch.device("cpu")
        )
        loss(model, mine(next(batches()))).backward()
        found[f"wrapped before FSDP1 {original}"] = message(opt.step)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
    model = network()
    twice = distribute_tensor(model.head.weight.detach(), mesh, [Shard(0), Shard(1)])
    model.head.weight = nn.Parameter(twice)
    found["split twice"] = dict(discover(model).skipped)["head.weight"]
    return found


def after_an_evaluation(folder):
    """Wrapping, and a step with an unused weight, after a forward pass without backward."""
    found = {}
    model, whole = shard(network()), network()
    base = sgd(model)
    evaluate(model)
    opt = SNROptimizer(base, model, LAMBDA, **STEADY)
    found["targets"] = [target.name for target in opt.targets]
    train(whole, SNROptimizer(sgd(whole), whole, LAMBDA, **STEADY), 5)
    train(model, opt, 5, part=mine)
    found["from_reference"] = distance(model, whole)
    opt.zero_grad()
    evaluate(model)
    found["step"] = message(opt.step)  # all weights are unused
    found["add"] = message(lambda: opt.add_param_group({"params": [torch.ones(2)]}))
    return found


def evaluate(model):
    with torch.no_grad():
        loss(model, mine(next(batches())))


def wrapped_inside(folder):
    """Names of weights in a checkpoint wrapper that was sharded."""
    model = network()
    model.hidden = checkpoint_wrapper(model.hidden)
    return [target.name for target in discover(shard(model)).targets]


def fsdp1(model, use_orig_params):
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=cpu)


def message(function):
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def checkpoints(folder):
    """Save after 5 steps of 10; the launch with four processes loads what two have saved."""
    path, beside = folder.parent / "checkpoint", folder.parent / "snr_hooks.pt"
    model = shard(network())
    opt = SNROptimizer(adamw(model), model, LAMBDA, **STEADY)
    if dist.get_world_size() == 2:
        train(model, opt, 5, part=mine)
        weights, states = get_state_dict(model, opt)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
        if dist.get_rank() == 0:  # every process has the same vectors
            torch.save(opt.state_dict()["snr_hooks"], beside)
    else:
        weights, states = get_state_dict(model, opt)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=states)
        opt.load_state_dict(opt.state_dict() | {"snr_hooks": torch.load(beside)})
    train(model, opt, 10, first=5, part=mine)
    reference = network()
    train(reference, SNROptimizer(adamw(reference), reference, LAMBDA, **STEADY), 10)
    return distance(model, reference)


SCENARIOS = [trajectories, layouts, accumulation, communication, checkpoints]

if __name__ == "__main__":
    two = os.environ["WORLD_SIZE"] == "2"
    work(SCENARIOS + [terms, norms, after_an_evaluation, wrapped_inside, refused] * two)
