"""The training recipe: what it accepts, writes and refuses, and that killing it costs nothing."""

import csv
import dataclasses
import io
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from _oracles import as_matrix
from PIL import Image

from recipes import report
from recipes.recipe import Recipe, RecipeError, parse, read
from recipes.train import CHECKPOINT, build, main, run
from snr_hooks import SNROptimizer

ROOT = Path(__file__).parent.parent
TOY = {"epochs": 2, "subset": 64, "batch_size": 32}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, unrendered):
    """Run in an empty folder, so that nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)


def toy(**entries):
    return Recipe(**{**read("digits"), **TOY, **entries})


def weights(output):
    return torch.load(Path(output) / CHECKPOINT, weights_only=True)["state_dict"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def rows(output):
    with (Path(output) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# --- the run ---


def test_a_run_writes_metrics_pictures_table_and_checkpoint(capsys, unrendered):
    unrendered.undo()
    optimizer = run(toy(), Path("out"))
    assert isinstance(optimizer, SNROptimizer)
    assert [row["epoch"] for row in rows("out")] == ["0", "1"]
    columns = {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "sigma_max"}
    assert columns < set(rows("out")[0])
    for name in ("curves.png", "spectra.png"):
        with Image.open(Path("out") / name) as picture:
            assert picture.width > 600
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
    printed = capsys.readouterr().out
    table = Path("out/audit.txt").read_text()
    assert table in printed
    assert "epoch   2/2" in printed


def test_the_table_holds_sigma_before_and_after():
    recipe = toy()
    start = build(recipe).model.fc.weight.detach()
    run(recipe, Path("out"))
    end = weights("out")["fc.weight"]
    line = next(
        line for line in Path("out/audit.txt").read_text().splitlines() if line.startswith("fc.")
    )
    before, after = (float(torch.linalg.svdvals(as_matrix(w).double())[0]) for w in (start, end))
    assert line.split()[1:3] == [f"{before:.4f}", f"{after:.4f}"]
    assert before != after


def test_reported_accuracy_and_loss_are_those_of_the_saved_weights():
    recipe = toy()
    run(recipe, Path("out"))
    training = build(recipe)
    training.model.load_state_dict(weights("out"))
    training.model.eval()
    loss = correct = total = 0
    with torch.no_grad():
        for images, labels in training.loaders.test:
            output = training.model(images)
            loss += torch.nn.functional.cross_entropy(output, labels, reduction="sum").item()
            correct += int((output.argmax(1) == labels).sum())
            total += len(labels)
    assert total == 360
    assert float(rows("out")[-1]["test_accuracy"]) == pytest.approx(100 * correct / total, abs=1e-4)
    assert float(rows("out")[-1]["test_loss"]) == pytest.approx(loss / total, rel=1e-5)


def test_the_regularizer_acts_and_lambda_0_switches_it_off():
    for strength in (0.0, 2.0):
        run(toy(snr_lambda=strength, sched="none", sched_kwargs={}), Path(f"out{strength}"))
    plain, regularized = (float(rows(f"out{s}")[-1]["sigma_max"]) for s in (0.0, 2.0))
    assert regularized < 0.97 * plain  # equal if the strength is ignored


def test_the_same_recipe_runs_on_other_models():
    for model in ("test_vit", "test_convnext", "mobilenetv3_small_050"):
        run(toy(model=model, epochs=1, transform_kwargs={}), Path(model))
        assert len(rows(model)) == 1


@pytest.mark.parametrize(
    ("model", "choose", "seen"),
    [
        ("test_vit", "vit", "heads of"),
        pytest.param("mobilenetv3_small_050", "mobile", "groups of", marks=pytest.mark.slow),
        pytest.param(
            "test_resnet",
            {"conv1.0.weight": {"view": "operator", "penalty": "sigma"}},
            "operator",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_chosen_is_trained_audited_and_resumed(model, choose, seen):
    options = {"model": model, "choose": choose, "transform_kwargs": {}, "decoupled": True}
    run(toy(**options), Path("whole"))
    assert seen in Path("whole/audit.txt").read_text()
    with pytest.raises(KeyboardInterrupt):
        run_until(1, toy(**options), Path("killed"))
    run(toy(**options), Path("killed"))
    assert_same_weights("whole", "killed")


def run_until(epoch, recipe, output):
    """Run a recipe and interrupt it after some epochs."""
    write = report.write_csv

    def interrupt(path, history):
        write(path, history)
        if len(history) == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_csv", interrupt)
        run(recipe, output)


def test_choices_on_the_command_line_are_yaml(capsys):
    recipe, _ = parse(["digits", "--choose", "vit", "--decoupled"])
    assert (recipe.choose, recipe.decoupled) == ("vit", True)
    recipe, _ = parse(["digits", "--choose", "{'*.weight': {view: heads, penalty: {hinge: 1}}}"])
    assert recipe.choose == {"*.weight": {"view": "heads", "penalty": {"hinge": 1}}}
    with pytest.raises(SystemExit):
        parse(["digits", "--choose", "{"])
    assert "argument --choose: expected YAML, found '{'" in capsys.readouterr().err


def test_pretrained_weights_are_passed_to_timm():
    donor = build(toy(seed=5)).model.state_dict()
    torch.save(donor, "donor.pth")
    overlay = {"file": "donor.pth", "num_classes": 10}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = build(toy(model_kwargs=kwargs)).model
    assert torch.equal(model.fc.weight, donor["fc.weight"])


# --- resuming ---


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_run_interrupted_after_an_epoch_ends_at_the_same_weights(opt):
    recipe = toy(epochs=3, opt=opt, lr=0.01, model_kwargs={"drop_rate": 0.2})
    run(recipe, Path("whole"))
    with pytest.raises(KeyboardInterrupt):
        run_until(2, recipe, Path("parts"))
    run(recipe, Path("parts"))
    assert_same_weights("whole", "parts")
    assert rows("whole") == rows("parts")


def test_a_run_killed_between_the_last_checkpoint_and_its_metrics_completes_them():
    run(toy(), Path("out"))
    complete = rows("out")
    Path("out", "metrics.csv").unlink()
    run(toy(), Path("out"))
    assert rows("out") == complete


def test_a_finished_run_is_not_trained_again_unless_asked(capsys):
    run(toy(), Path("out"))
    before = Path("out", CHECKPOINT).stat().st_mtime_ns
    capsys.readouterr()
    run(toy(), Path("out"))
    assert "continuing out after epoch 2 of 2" in capsys.readouterr().out
    assert Path("out", CHECKPOINT).stat().st_mtime_ns == before
    run(toy(), Path("out"), fresh=True)
    assert Path("out", CHECKPOINT).stat().st_mtime_ns != before


# --- the command line ---


def test_every_entry_can_be_overridden_on_the_command_line():
    line = (
        "digits --model vit_tiny_patch16_224 --img-size 48 --data folder:x --download "
        "--subset 100 --opt adamw --lr 1e-3 --snr-lambda 0 --sched-kwargs warmup_epochs=3 "
        "--transform-kwargs hflip=0.5 --snr-kwargs include=head.* n_power_iterations=2 "
        "--no-download --output there --fresh"
    )
    recipe, options = parse(shlex.split(line))
    assert (recipe.model, recipe.img_size, recipe.data) == ("vit_tiny_patch16_224", 48, "folder:x")
    assert (recipe.subset, recipe.opt, recipe.lr, recipe.snr_lambda) == (100, "adamw", 0.001, 0)
    assert recipe.download is False
    assert recipe.sched_kwargs == {"warmup_epochs": 3}
    assert recipe.transform_kwargs["hflip"] == 0.5
    assert recipe.transform_kwargs["ratio"] == [0.9, 1.1]  # merged with the file's
    assert recipe.snr_kwargs == {"include": "head.*", "n_power_iterations": 2}
    assert (str(options.output), options.fresh) == ("there", True)


def test_the_output_is_named_after_the_recipe():
    Path("mine.yaml").write_text(yaml.safe_dump({"lr": "1e-3"}))
    recipe, options = parse(["mine.yaml"])
    assert recipe.lr == 0.001  # YAML reads 1e-3 as a string
    assert str(options.output) == "runs/mine"


def test_a_run_from_a_recipe_file_that_the_run_itself_wrote():
    run(toy(), Path("out"))
    assert Recipe(**read("out/recipe.yaml")) == toy()


# --- bad input ---


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": "vit_tiny_patch16_225"}, "unknown model 'vit_tiny_patch16_225'; nearest: vit_t"),
        ({"opt": "adamv"}, "unknown optimizer 'adamv'; nearest: adam"),
        ({"epochs": 0}, "expected epochs to be at least 1, found 0"),
        ({"seed": -1}, "expected seed to be at least 0, found -1"),
        ({"workers": -1}, "expected workers to be at least 0, found -1"),
        ({"transform_kwargs": {"scale": 5}}, "refused transform_kwargs.*int"),
        ({"batch_size": -1, "subset": None}, "expected batch_size to be at least 1, found -1"),
        ({"subset": 10}, "expected subset to hold at least one batch of 32, found 10"),
        ({"data": "cifar11"}, "unknown data set 'cifar11'; nearest: cifar10"),
        ({"data": "folders:x"}, "unknown kind of data 'folders'; nearest: folder"),
        ({"data": "folder:x"}, r"expected 'x' to hold train/ and test/ .* found no x/train"),
        ({"data": "cifar10"}, "expected cifar10 in the folder 'data'.*--download"),
        ({"snr_lambda": -1.0}, "decoupled or snr_kwargs: expected lambda_ to be finite"),
        ({"snr_kwargs": {"inclde": "fc"}}, "refused snr_lambda, choose, decoupled.*inclde"),
        ({"choose": "vitt"}, "refused snr_lambda, choose, decoupled.*nearest: 'vit'"),
        ({"choose": {"fv.*": "heads"}}, "pattern 'fv.*' in choose matches no parameter"),
        ({"snr_kwargs": {"include": "fv.*"}}, "'fv.*' matches no parameter.*nearest"),
        ({"opt_kwargs": {"nonsense": 1}}, "refused opt, lr, momentum, weight_decay or opt_kwargs"),
        ({"micro_batch": 0}, "expected micro_batch to be at least 1, found 0"),
        ({"test_subset": 0}, "expected test_subset to be at least 1, found 0"),
        ({"validation": 1.0}, r"expected validation to be in \[0, 1\), found 1.0"),
        ({"validation": 0.001}, "validation to leave images on both sides, found 0.001 of 64"),
        ({"adversarial_eps": -1.0}, "expected adversarial_eps to be at least 0, found -1.0"),
        ({"adversarial_eps": float("nan")}, "expected adversarial_eps to be at least 0"),
        ({"adversarial_alpha": 0.0}, r"expected adversarial_alpha to be in \(0, 1\], found 0.0"),
        ({"sched": "cosin"}, "refused sched or sched_kwargs: Unknown scheduler 'cosin'"),
        ({"sched_kwargs": {"nonsense": 1}}, "refused sched or sched_kwargs.*nonsense"),
        ({"model_kwargs": {"nonsense": 1}}, "refused model, img_size or model_kwargs"),
        ({"transform_kwargs": {"nonsense": 1}}, "refused transform_kwargs.*nonsense"),
    ],
)
def test_bad_entries(entries, message):
    with pytest.raises(RecipeError, match=message):
        build(toy(**entries))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown key in .* 'modle'; nearest: model"),
        ("lr: fast", "expected lr in .* to be float, found 'fast'"),
        ("epochs: 1.5", "expected epochs in .* to be int, found 1.5"),
        ("download: perhaps", "expected download in .* to be bool, found 'perhaps'"),
        ("opt_kwargs: 3", "expected opt_kwargs in .* to be dict, found 3"),
        ("- a\n- b", "to map keys to values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_bad_recipe_files(text, message):
    Path("bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read("bad.yaml")


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(RecipeError, match="unknown recipe 'digit'; nearest: digits"):
        read("digit")
    with pytest.raises(RecipeError, match=r"found none at nowhere\.yaml"):
        read("nowhere.yaml")


def damaged(content, damage):
    """Return the bytes of a broken version of a checkpoint."""
    if damage in ("empty", "text"):
        return {"empty": b"", "text": b"x"}[damage]
    if damage == "truncated":
        return content[: len(content) // 2]
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    if damage == "foreign":
        checkpoint = {"state_dict": {}}
    elif damage == "list":
        checkpoint = [1, 2]
    elif damage == "weights of another shape":
        checkpoint["state_dict"]["fc.bias"] = torch.ones(3)
    elif damage == "nan vector":
        checkpoint["optimizer"]["snr_hooks"]["vectors"]["fc.weight"]["left"].fill_(torch.nan)
    else:
        del checkpoint[damage]
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        *("truncated", "empty", "text", "foreign", "list", "weights of another shape"),
        *("nan vector", "optimizer", "history", "recipe"),
    ],
)
def test_a_broken_checkpoint_is_refused_and_kept(damage):
    run(toy(), Path("out"))
    path = Path("out", CHECKPOINT)
    path.write_bytes(damaged(path.read_bytes(), damage))
    broken = path.read_bytes()
    with pytest.raises(RecipeError, match=r"(?s)truncated or foreign file.*--fresh"):
        run(toy(), Path("out"))
    assert path.read_bytes() == broken


def test_a_checkpoint_of_another_recipe_is_refused():
    run(toy(), Path("out"))
    with pytest.raises(RecipeError, match=r"another recipe \(lr is 0\.05 there and 0\.2 here\)"):
        run(toy(lr=0.2), Path("out"))
    run(toy(workers=1, data_dir="elsewhere"), Path("out"))  # these do not change the result


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("digit", "error: unknown recipe 'digit'"),
        ("digits --modle x", "error: unknown option '--modle'; nearest: --model"),
        ("digits more", "error: unknown option 'more'"),
        ("digits --opt-kwargs nesterov", "expected KEY=VALUE after --opt-kwargs, found 'nesterov'"),
        ("digits --output taken", "error: expected to write to the folder taken"),
    ],
)
def test_main_reports_errors_without_a_traceback(line, message):
    Path("taken").write_text("a file")
    with pytest.raises(SystemExit, match=message):
        main(line.split())


def test_main_reports_an_interruption_without_a_traceback(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.train.run", interrupted)
    with pytest.raises(SystemExit, match="the same command continues"):
        main(["digits"])


def test_help_explains_every_entry(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for entry in dataclasses.fields(Recipe):
        assert entry.metadata["help"] in printed


def test_names_from_the_hub_are_left_to_timm():
    assert toy(model="hf-hub:timm/resnet18.a1_in1k").model.startswith("hf-hub:")


# --- the pictures ---


def test_many_layers_are_thinned_out_evenly(monkeypatch):
    drawn = []

    def two_of(names, most):
        drawn.append(most)
        return names[:2]

    values = {f"layer{i}.weight": torch.ones(3) for i in range(50)}
    with monkeypatch.context() as patch:
        patch.setattr(report, "evenly_spaced", two_of)
        report.draw_spectra(Path("spectra.png"), values, values, "title")
    assert drawn == [report.MAX_PANELS]
    names = list(values)
    chosen = report.evenly_spaced(names, 24)
    assert len(chosen) == len(set(chosen)) == 24
    assert (chosen[0], chosen[-1]) == (names[0], names[-1])
