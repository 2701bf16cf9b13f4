"""In other people's loops the wrapper does what the same loop, written by hand, does with it.

Two things are compared with: the penalty written into the loss of a plain optimizer, with exact
terms, which tells whether the term is there once a step; and the wrapper in a loop by hand,
bitwise, which tells whether a client changes, moves or forgets anything.
"""

import argparse
import copy

import pytest
import timm.models
import timm.utils
import torch
import torch.distributed.checkpoint as dcp
from _models import build
from _oracles import penalty
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader

from snr_hooks import SNROptimizer, audit, discover

LAMBDA = 0.05
MAX_NORM = 0.1  # exceeded at every step of these models


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def lbfgs(model):
    return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)


def wrap(model, make=sgd, **options):
    return SNROptimizer(make(model), model, LAMBDA, **options)


def cosine(opt):
    return CosineAnnealingLR(opt, 6)


def data(model, n_batches):
    """Batches, stacked: a tensor is a data set, and a sequence of batches, to every client."""
    generator = torch.Generator().manual_seed(2)
    example = model.example
    return torch.randn(n_batches, *example.shape, generator=generator, dtype=example.dtype)


def loss_of(model, x):
    return (model(x).to(x.dtype) - 0.5).square().mean()  # in the dtype outside autocast


def clip_norm(model):
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


def by_hand(
    model,
    opt,
    batches,
    *,
    accumulate=1,
    clip=lambda model: None,
    scheduler=None,
    scaler=None,
    autocast=None,
    strengths=None,
    after_step=lambda model: None,
):
    """Train in the loop that a client spares one; ``strengths`` puts the penalty into the loss."""
    scaling = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for micro_batches in batches.unflatten(0, (-1, accumulate)):

        def closure(micro_batches=micro_batches):
            opt.zero_grad()
            for i, x in enumerate(micro_batches):
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = loss_of(model, x) / accumulate
                if strengths and i == 0:
                    loss = loss + penalty(model, strengths)
                scaling.scale(loss).backward()
            scaling.unscale_(opt)
            clip(model)
            return loss

        if scaler is None:
            opt.step(closure)
        else:
            closure()
            scaler.step(opt)
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        after_step(model)


def strengths_of(model):
    return dict.fromkeys((target.name for target in discover(model).targets), LAMBDA)


def with_penalty(name, batches, make=sgd, schedule=None, **loop):
    """A model trained by hand with the penalty in the loss and no wrapper at all."""
    model = build(name)
    opt = make(model)
    scheduler = None if schedule is None else schedule(opt)
    by_hand(model, opt, batches, scheduler=scheduler, strengths=strengths_of(model), **loop)
    return model


def assert_close(model, reference):
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-9, atol=1e-11)


def assert_same(model, reference):
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)


def randomize(model):
    """Give a model other weights, so that those it continues with are the loaded ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))


def n_hooks(model):
    """Count the hooks that the parameters carry."""
    return sum(
        len(p._backward_hooks or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
        for p in model.parameters()
    )


# --- accelerate ---


@pytest.fixture
def accelerator():
    """A function that makes an Accelerator as a new process would: its state is global."""
    accelerate = pytest.importorskip("accelerate")

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    def make(**options):
        reset()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    reset()


def accelerated(accelerator, model, opt, scheduler, batches, folder=None):
    """Train as accelerate's documentation does; load from ``folder`` before, if given."""
    loader = DataLoader(batches, batch_size=None)
    model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
    if folder is not None:
        accelerator.load_state(folder)
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return opt


@pytest.mark.parametrize("make", [sgd, adamw])
def test_accelerate_accumulates_clips_and_schedules_with_one_term_a_step(accelerator, make):
    model = build("convolutions")
    batches = data(model, 12)
    opt = wrap(model, make, exact=True, scaler=accelerator().scaler)
    accelerated(accelerator(gradient_accumulation_steps=3), model, opt, cosine(opt), batches)
    loop = {"accumulate": 3, "clip": clip_norm, "schedule": cosine}
    assert_close(model, with_penalty("convolutions", batches, make, **loop))


def test_accelerate_resumes_bitwise_in_fresh_objects(accelerator, tmp_path):
    whole, model, resumed = (build("convolutions") for _ in range(3))
    batches = data(whole, 12)
    opt = wrap(whole)
    by_hand(whole, opt, batches, accumulate=2, clip=clip_norm, scheduler=cosine(opt))

    client, opt = accelerator(gradient_accumulation_steps=2), wrap(model)
    accelerated(client, model, opt, cosine(opt), batches[:6])
    client.save_state(tmp_path)
    randomize(resumed)
    client, opt = accelerator(gradient_accumulation_steps=2), wrap(resumed)
    accelerated(client, resumed, opt, cosine(opt), batches[6:], tmp_path)
    assert_same(resumed, whole)


def test_accelerate_in_bfloat16_equals_autocast_by_hand(accelerator):
    model, reference = build("mlp", torch.float32), build("mlp", torch.float32)
    batches = data(model, 5)
    client = accelerator(mixed_precision="bf16")
    assert client.scaler is None
    opt, other = wrap(model, scaler=client.scaler), wrap(reference)
    accelerated(client, model, opt, cosine(opt), batches)
    loop = {"clip": clip_norm, "scheduler": cosine(other), "autocast": torch.bfloat16}
    by_hand(reference, other, batches, **loop)
    assert_same(model, reference)


def accelerator_with_scaler(accelerator):
    """What Accelerator makes of fp16 on a GPU, where alone it scales."""
    client = accelerator(mixed_precision="fp16", gradient_accumulation_steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    client.scaler, client.native_amp = scaler, True
    return client


def test_scaler_of_accelerate_is_a_torch_one_and_steps_skipped_by_it_leave_no_trace(accelerator):
    accelerate = pytest.importorskip("accelerate")
    made_on_gpus = accelerate.utils.get_grad_scaler(enabled=False)
    assert isinstance(made_on_gpus, torch.amp.GradScaler)
    client = accelerator_with_scaler(accelerator)
    model = build("mlp")  # in float64, which autocast leaves alone
    batches = data(model, 10)
    infinite = batches.clone()
    infinite[4, 0] = torch.inf
    opt = wrap(model, exact=True, scaler=client.scaler)
    prepared = accelerated(client, model, opt, cosine(opt), infinite)
    assert prepared.optimizer is opt
    assert client.scaler.get_scale() == 2048.0
    sound = torch.cat([batches[:4], batches[6:]])
    loop = {"accumulate": 2, "clip": clip_norm, "schedule": cosine}
    assert_close(model, with_penalty("mlp", sound, **loop))


# --- Lightning ---

# Lightning 2.6 calls what torch 2.14 has deprecated.
lightning_test = pytest.mark.filterwarnings(
    r"ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"
)


def lightning_module(model, make=sgd, schedule=None, **options):
    """A LightningModule around a model, with the scaler of whatever plugin is at work."""
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, x, _):
            return loss_of(self.model, x)

        def configure_optimizers(self):
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            opt = wrap(self.model, make, **{"scaler": scaler} | options)
            if schedule is None:
                return opt
            steps = {"scheduler": schedule(opt), "interval": "step"}
            return {"optimizer": opt, "lr_scheduler": steps}

    return Training()


def trainer(folder, **options):
    lightning = pytest.importorskip("lightning")
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    defaults = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder}
    return lightning.Trainer(**quiet, **defaults | options)


@lightning_test
@pytest.mark.parametrize(
    ("make", "accumulate", "clip"),
    [(sgd, 3, MAX_NORM), (adamw, 1, None), (lbfgs, 1, None)],
)
def test_lightning_steps_with_one_term_a_step(tmp_path, make, accumulate, clip):
    """Its step takes a closure, which LBFGS evaluates several times."""
    model = build("convolutions")
    batches = data(model, 12)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    module = lightning_module(model, make, cosine, exact=True)
    trainer(tmp_path, **options).fit(module, batches)
    loop = {"accumulate": accumulate, "schedule": cosine}
    if clip is not None:
        loop["clip"] = clip_norm
    assert_close(model, with_penalty("convolutions", batches, make, **loop))


@lightning_test
def test_lightning_fits_a_module_again_with_another_trainer_or_after_a_search(tmp_path):
    lightning = pytest.importorskip("lightning")
    model = build("convolutions")
    module, batches = lightning_module(model), data(model, 4)
    trainer(tmp_path).fit(module, batches)
    last = trainer(tmp_path)  # that before was dropped, but is in a cycle with its wrapper
    lightning.pytorch.tuner.Tuner(last).lr_find(
        module, batches, num_training=3, attr_name="unused", update_attr=False
    )
    last.optimizers[0].remove()
    last.fit(module, batches)
    assert last.optimizers[0].targets


@lightning_test
def test_lightning_resumes_bitwise_from_its_checkpoint(tmp_path):
    whole, model, resumed = (build("convolutions") for _ in range(3))
    batches = data(whole, 4)
    opt = wrap(whole)
    loop = {"accumulate": 2, "clip": clip_norm, "scheduler": cosine(opt)}
    by_hand(whole, opt, batches.repeat(3, 1, 1, 1, 1), **loop)

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": MAX_NORM}
    first = trainer(tmp_path, **options)
    first.fit(lightning_module(model, schedule=cosine), batches)
    first.save_checkpoint(tmp_path / "c.ckpt")
    randomize(resumed)
    second = trainer(tmp_path, max_epochs=3, **options)
    second.fit(lightning_module(resumed, schedule=cosine), batches, ckpt_path=tmp_path / "c.ckpt")
    assert_same(resumed, whole)


@lightning_test
@pytest.mark.parametrize(
    ("precision", "max_norm"),
    [
        ("bf16-mixed", None),
        ("bf16-mixed", MAX_NORM),
        ("16-mixed", MAX_NORM),
        ("bf16-true", MAX_NORM),
        ("16-true", MAX_NORM),
    ],
)
def test_lightning_in_low_precision_equals_the_loop_by_hand(tmp_path, precision, max_norm):
    lightning = pytest.importorskip("lightning")
    mixed = precision.endswith("mixed")
    half = torch.bfloat16 if precision.startswith("bf") else torch.float16
    model, reference = (build("mlp", torch.float32 if mixed else half) for _ in range(2))
    scalers = None, None
    options = {"precision": precision}
    if precision == "16-mixed":
        # As a name it becomes bf16-mixed on a CPU; the plugin does as it is told.
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
        plugin = lightning.pytorch.plugins.MixedPrecision(precision, "cpu", scalers[0])
        options = {"plugins": plugin}
    batches = data(model, 4)
    client = trainer(tmp_path, gradient_clip_val=max_norm, **options)
    client.fit(lightning_module(model), batches)
    loop = {"scaler": scalers[1], "autocast": half if mixed else None}
    if max_norm is not None:
        loop["clip"] = clip_norm
    by_hand(reference, wrap(reference, scaler=scalers[1]), batches, **loop)
    assert_same(model, reference)
    if precision == "16-mixed":
        assert scalers[0].get_scale() == 1024.0  # no step was skipped


@lightning_test
def test_lightning_by_manual_optimization_of_two_networks_in_turn(tmp_path):
    """Toggling freezes the weights of the other network, and its hooks outlive that."""
    lightning = pytest.importorskip("lightning")
    models = [build("mlp"), build("mlp")]

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.models = nn.ModuleList(models)

        def training_step(self, x, _):
            for opt, scheduler, model in zip(
                self.optimizers(), self.lr_schedulers(), self.models, strict=True
            ):
                with self.toggled_optimizer(opt):
                    opt.zero_grad()
                    for part in x.chunk(2):
                        product = self.models[0](part) * self.models[1](part)
                        self.manual_backward(product.sum() + loss_of(model, part))
                    self.clip_gradients(opt, MAX_NORM, "norm")
                    opt.step()
                    scheduler.step()
                    assert max(row.error for row in audit(opt)) < 1e-9

        def configure_optimizers(self):
            opts = [wrap(model, exact=True) for model in self.models]
            return opts, [cosine(opt) for opt in opts]

    batches = data(models[0], 5)[:, :4]
    trainer(tmp_path).fit(Manual(), batches)

    references = [build("mlp"), build("mlp")]
    opts = [sgd(model) for model in references]
    schedulers = [cosine(opt) for opt in opts]
    for x in batches:
        for opt, scheduler, model in zip(opts, schedulers, references, strict=True):
            product = references[0](x) * references[1](x)
            halves = sum(loss_of(model, part) for part in x.chunk(2))
            loss = product.sum() + halves + penalty(model, strengths_of(model))
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient
            clip_norm(model)
            opt.step()
            scheduler.step()
    for model, reference in zip(models, references, strict=True):
        assert_close(model, reference)


def test_remove_through_the_optimizer_that_lightning_hands_out():
    lightning = pytest.importorskip("lightning")
    model = build("with_frozen")
    opt = wrap(model)
    handed_out = lightning.pytorch.core.optimizer.LightningOptimizer(opt)
    assert isinstance(handed_out, SNROptimizer)
    handed_out.remove()
    model.body[0].weight.requires_grad_(True)
    opt.zero_grad()
    assert opt.targets == handed_out.targets == ()
    assert n_hooks(model) == 0


# --- timm ---


def clip_as_timm(mode, value):
    return lambda model: timm.utils.dispatch_clip_grad(model.parameters(), value, mode)


def averaging(ema):
    return lambda model: ema.update(model)


@pytest.mark.parametrize(("mode", "value"), [("norm", MAX_NORM), ("value", 0.01), ("agc", 0.01)])
def test_timm_scales_accumulates_clips_and_averages_with_one_term_a_step(mode, value):
    model = build("convolutions")
    batches = data(model, 12)
    native = timm.utils.NativeScaler("cpu")
    opt = wrap(model, exact=True, scaler=native._scaler)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    for i, x in enumerate(batches):
        last = i % 3 == 2
        clip = {"clip_grad": value, "clip_mode": mode, "parameters": model.parameters()}
        native(loss_of(model, x) / 3, opt, need_update=last, **clip)
        if last:
            ema.update(model)
            opt.zero_grad()

    average = build("convolutions").state_dict()

    def average_by_hand(reference):
        for name, p in reference.state_dict().items():
            average[name] = (average[name] + p) / 2

    loop = {"accumulate": 3, "clip": clip_as_timm(mode, value), "after_step": average_by_hand}
    assert_close(model, with_penalty("convolutions", batches, **loop))
    torch.testing.assert_close(ema.module.state_dict(), average)
    assert n_hooks(ema) == 0


def test_timm_resumes_bitwise_from_its_checkpoint(tmp_path):
    def objects():
        model, native = build("convolutions", torch.float32), timm.utils.NativeScaler("cpu")
        native._scaler.set_growth_interval(2)
        opt = wrap(model, adamw, scaler=native._scaler)
        return model, opt, native, timm.utils.ModelEmaV3(model, decay=0.9)

    def run(model, opt, native, ema, batches):
        by_hand(model, opt, batches, scaler=native._scaler, after_step=averaging(ema))

    model, opt, native, ema = whole = objects()
    batches = data(model, 11)
    run(*whole, batches[:5])
    saver = timm.utils.CheckpointSaver(
        model,
        opt,
        args=argparse.Namespace(model="convolutions"),
        model_ema=ema,
        amp_scaler=native,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=0)
    run(*whole, batches[5:])

    resumed, opt, native, average = fresh = objects()
    randomize(resumed)
    path = str(tmp_path / "last.pth.tar")
    assert timm.models.resume_checkpoint(resumed, path, opt, native, log_info=False) == 1
    timm.models.load_checkpoint(average.module, path, use_ema=True)
    run(*fresh, batches[5:])
    assert_same(resumed, model)
    assert_same(average, ema)


# --- scalers that the wrapper was not given ---


def train_with_timm(model, opt, **_):
    timm.utils.NativeScaler("cpu")(loss_of(model, model.example), opt)


def train_with_accelerate(model, opt, request, **_):
    client = accelerator_with_scaler(request.getfixturevalue("accelerator"))
    accelerated(client, model, opt, cosine(opt), data(model, 2))


def train_with_lightning(model, opt, request, tmp_path):
    lightning = pytest.importorskip("lightning")
    opt.remove()  # the module makes its own
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu")
    trainer(tmp_path, plugins=plugin).fit(lightning_module(model, scaler=None), data(model, 2))


@lightning_test
@pytest.mark.parametrize("train", [train_with_timm, train_with_accelerate, train_with_lightning])
def test_a_scaler_that_the_wrapper_was_not_given_is_refused_before_a_step(train, request, tmp_path):
    model = build("mlp")
    with pytest.raises(RuntimeError, match=r"pass the scaler as SNROptimizer\("):
        train(model, wrap(model), request=request, tmp_path=tmp_path)
    assert_same(model, build("mlp"))


# --- torch: weight averaging ---


def test_swa_averages_what_the_schedule_of_the_wrapped_optimizer_has_made():
    model = build("mlp")
    model.body.insert(1, nn.BatchNorm1d(8, dtype=torch.float64))
    reference = copy.deepcopy(model)
    batches = data(model, 12)
    opt, plain = wrap(model, exact=True), sgd(reference)
    averaged = AveragedModel(model)
    schedules = [SWALR(o, swa_lr=0.2, anneal_epochs=5) for o in (opt, plain)]
    by_hand(model, opt, batches, scheduler=schedules[0], after_step=averaged.update_parameters)
    states = []
    by_hand(
        reference,
        plain,
        batches,
        scheduler=schedules[1],
        strengths={"body.0.weight": LAMBDA, "body.3.weight": LAMBDA},
        after_step=lambda model: states.append(copy.deepcopy(model.state_dict())),
    )
    assert opt.optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.2
    for name, p in averaged.module.named_parameters():
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(p, mean, rtol=1e-9, atol=1e-11)

    update_bn(batches, averaged)
    assert n_hooks(averaged) == 0
    hidden = averaged.module.body[0](batches)
    expected = hidden.mean((0, 1)), hidden.var(1).mean(0)
    norm = averaged.module.body[1]
    torch.testing.assert_close((norm.running_mean, norm.running_var), expected)


# --- torch: distributed checkpoints in one process ---


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("n_steps_before_loading", [0, 1])
@pytest.mark.parametrize("beside", [True, False])
def test_dcp_continues_bitwise_with_the_vectors_beside_it_and_warms_up_without(
    tmp_path, beside, n_steps_before_loading
):
    model, resumed = build("convolutions"), build("convolutions")
    batches = data(model, 10)
    opt = wrap(model)
    by_hand(model, opt, batches[:5])
    weights, states = get_state_dict(model, opt)
    assert "snr_hooks" not in states
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "checkpoint")
    torch.save(opt.state_dict()["snr_hooks"], tmp_path / "snr_hooks.pt")

    randomize(resumed)
    other = wrap(resumed)
    by_hand(resumed, other, batches[:n_steps_before_loading])  # finds vectors of these weights
    weights, states = get_state_dict(resumed, other)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "checkpoint")
    set_state_dict(resumed, other, model_state_dict=weights, optim_state_dict=states)
    if beside:
        vectors = torch.load(tmp_path / "snr_hooks.pt")
        other.load_state_dict(other.state_dict() | {"snr_hooks": vectors})
    else:
        assert max(row.error for row in audit(other)) < 1e-2
        plain = copy.deepcopy(opt.state_dict())
        del plain["snr_hooks"]
        opt.remove()
        opt = wrap(model)
        opt.load_state_dict(plain)
    by_hand(model, opt, batches[5:])
    by_hand(resumed, other, batches[5:])
    assert_same(resumed, model)


def test_an_optimizer_that_accelerate_has_prepared_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = build("mlp")
    prepared = accelerate.Accelerator(cpu=True).prepare(sgd(model))
    with pytest.raises(ValueError, match=r"an AcceleratedOptimizer, which holds.*wrap first"):
        SNROptimizer(prepared, model)
