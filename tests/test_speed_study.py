"""The study of speeds: the plain networks are the same functions, the sides are what they say, tables and resuming."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import cnnfamily
from cnnfamily import models
from cnnfamily.models import googlenet

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments" / "speed"))
import compare
import determinism
import optimized
import plain
import side

SMALL = {"width": 0.25, "resolution": 64, "num_classes": 10}
FAMILIES = {  # a small variant of each
    "lenet5": {"width": 0.5},
    "alexnet": SMALL | {"hidden": 64},
    "vgg11_bn": SMALL | {"resolution": 32, "hidden": 64},
    "resnet18": SMALL | {"resolution": 32},
    "googlenet": SMALL | {"resolution": 33, "aux": True, "modules": googlenet.MODULES[1:4]},
    "mobilenet_v1": SMALL | {"resolution": 33, "depth": 0.2},
    "mobilenet_v2": SMALL | {"resolution": 33, "depth": 0.3},
    "mobilenet_v3_small": SMALL | {"depth": 0.3},
    "efficientnet_b0": SMALL | {"resolution": 33, "depth": 0.3},
}


FUNCTIONS = ("mobilenet_v2",)
VARIABLES = ("alexnet", "googlenet", "resnet50", "mobilenet_v3_large", "efficientnet_b0")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name not in FUNCTIONS)) for name in FAMILIES])
def test_the_plain_form_is_the_same_function(name):
    plain.check(name, **FAMILIES[name])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name not in VARIABLES)) for name in (*compare.MODELS, "efficientnet_b4")],
)
def test_the_plain_form_has_the_same_variables(name):
    plain.check_trees(cnnfamily.create_model(name, **({"aux": True} if name == "googlenet" else {})), resolution=0)


def test_a_tree_that_differs_is_seen(monkeypatch):
    monkeypatch.setitem(plain.REPLACED, "Linear", lambda units, *_, name, **__: plain.nn.Dense(units + 1, name=name))
    with pytest.raises(AssertionError, match="LeNet5: 4 variables differ"):
        plain.check_trees(cnnfamily.create_model("lenet5"))


def test_a_function_that_differs_is_seen(monkeypatch):
    monkeypatch.setitem(plain.REPLACED, "max_pool", lambda x, *_: plain.nn.avg_pool(x.astype("float32"), (2, 2), (2, 2)))
    with jax.numpy_dtype_promotion("standard"), pytest.raises(AssertionError, match="logits differ by"):
        plain.check("lenet5")


@pytest.mark.parametrize("name", ["googlenet", "efficientnet_b0", "vgg11_bn"])
def test_nothing_of_our_layers_is_left_in_the_plain_form(name):
    network = cnnfamily.create_model(name, **FAMILIES[name])
    images = np.zeros((1, 64, 64, 3), np.float32)
    variables = models.variable_shapes(network, resolution=64)

    def program() -> str:
        return str(jax.make_jaxpr(lambda *given: network.apply(*given))(variables, images))

    assert "custom_vjp" in program()
    with plain.layers_replaced():
        assert "custom_vjp" not in program()


@pytest.mark.parametrize("which", ["ours", "plain"])
@pytest.mark.parametrize("mode", ["train", pytest.param("infer", marks=pytest.mark.full)])
def test_a_side_answers_for_its_own_layers(which, mode, monkeypatch):
    made, answers = [], []
    conv = plain.conv
    monkeypatch.setitem(plain.REPLACED, "Conv", lambda *given, **named: made.append(1) or conv(*given, **named))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"steps": 1}\n{"steps": 3}\n'))
    job = {"side": which, "model": "lenet5", "dtype": "float32", "mode": mode, "batch": 2, "resolution": 32}
    with jax.numpy_dtype_promotion("standard"):
        side.run(argparse.Namespace(**job), answers.append)
    assert answers[0].keys() - {"temporary_bytes"} == {"ready"}
    assert [list(answer) for answer in answers[1:]] == [["seconds", "loss"]] * 2
    assert bool(made) == (which == "plain")
    if mode == "train":
        assert answers[2]["loss"] < answers[1]["loss"], "the state goes on from burst to burst"


def cells(**sides) -> dict:
    return {name: {"images_per_second": rates, "steps": 1} for name, rates in sides.items()}


def row_of(model, dtype, mode, sides) -> dict:
    job = {"model": model, "dtype": dtype, "mode": mode, "batch": 16, "resolution": 224}
    return job | {"rounds": 3, "commit": "abc", "sides": sides}


FLOAT32 = cells(ours=[10, 12, 11], plain=[5, 5, 5.5], eager=[8, 9, 7]) | {"compile": {"failed": "no | compiler"}}
STUDY = {
    "machine": {"device": "cpu", "processor": "P", "cores": 2, "system": "Linux"},
    "versions": {"jax": "0.10.2", "torch": "2.13.0"},
    "commands": ["python experiments/speed/compare.py"],
    "rows": [
        row_of("resnet50", "float32", "train", FLOAT32),
        row_of("resnet50", "bfloat16", "train", cells(ours=[22, 24, 20], plain=[11, 12, 11], eager=[40, 44, 48])),
        row_of("alexnet", "bfloat16", "train", cells(ours=[22, 24, 20], onednn=[30, 33, 36], eager=[40, 44, 48])),
        row_of("vgg16", "float32", "infer", {"ours": {"not_measured": "no batch norm"}} | cells(eager=[1000, 2000, 1500])),
    ],
}


def test_table():
    head, _, resnet, alexnet, vgg = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in compare.table(STUDY).splitlines() if line[:1] == "|"
    )
    resnet, vgg = dict(zip(head, resnet, strict=True)), dict(zip(head, vgg, strict=True))
    assert resnet["ours float32"] == "11.0 (10.0 to 12.0)"
    assert resnet["compile float32"] == "failed: no / compiler"
    assert resnet["ours / torch float32"] == "2.75"  # 22 / 8
    assert resnet["ours / torch"] == "0.50"  # 22 / 44
    assert resnet["ours / plain, float32"] == "2.00 (2.00 to 2.40)"
    assert resnet["ours / plain, bfloat16"] == "2.00 (1.82 to 2.00)"
    alexnet = dict(zip(head, alexnet, strict=True))
    assert (alexnet["onednn bfloat16"], alexnet["ours / torch"]) == ("33.0 (30.0 to 36.0)", "0.75")  # 33 / 44
    assert vgg["mode"] == "infer"
    assert vgg["ours float32"] == "not measured: no batch norm"
    assert vgg["eager float32"] == "1500 (1000 to 2000)"
    assert vgg["ours bfloat16"] == "not measured"
    assert vgg["ours / torch"] == vgg["ours / plain, float32"] == ""
    for what in ("n = 3 bursts", "P, 2 cores", "torch 2.13.0", "`python experiments/speed/compare.py`"):
        assert what in compare.table(STUDY)


def test_one_side_of_each_library_is_asked_for_device_and_versions(monkeypatch):
    asked = []

    class Stub:
        def __init__(self, job, python):
            asked.append(job["side"])

        def answer(self, timeout):
            return {"device": {"compile": "cuda"}.get(asked[-1], "cpu"), "cores": 2, "versions": {asked[-1]: "1"}}

        def stop(self):
            pass

    monkeypatch.setattr(compare, "Worker", Stub)
    pythons = dict.fromkeys(compare.SIDES, "python")
    for sides, expected in (
        (["ours", "plain", "eager", "compile"], ["ours", "eager"]),
        (["onednn", "plain", "eager"], ["onednn", "eager"]),
        (["plain"], ["plain"]),
    ):
        asked.clear()
        assert compare.describe(sides, pythons)["versions"] == dict.fromkeys(expected, "1")
    with pytest.raises(SystemExit, match="different devices"):
        compare.describe(["ours", "compile"], pythons)


def test_a_finished_row_is_not_measured_again():
    job = {"model": "resnet50", "dtype": "bfloat16", "mode": "train", "batch": 16, "resolution": 224}
    wanted = ["ours", "eager"]

    def left(sides=wanted, rounds=3, **changed):
        return compare.sides_to_measure(STUDY["rows"], job | changed, sides, rounds)

    assert left() == []
    assert left(rounds=5) == wanted
    assert left(mode="infer") == wanted
    assert left(batch=32) == wanted
    assert left(sides=["compile"]) == ["ours", "plain", "eager", "compile"], "a row is measured in one go"
    assert left(dtype="float32", sides=["compile"]) == [], "a side that failed is finished"


def test_results_of_another_machine_are_refused(tmp_path):
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(STUDY))
    where = {"machine": STUDY["machine"], "versions": {"jax": "0.10.2", "timm": "1.0"}}
    assert compare.load(file, where)["rows"] == STUDY["rows"]
    assert compare.load(file, where)["versions"] == {"jax": "0.10.2", "torch": "2.13.0", "timm": "1.0"}
    assert compare.load(tmp_path / "new.json", where)["rows"] == []
    for part, changed in (("versions", {"jax": "0.12"}), ("machine", {"cores": 4})):
        with pytest.raises(SystemExit, match="another machine or other versions"):
            compare.load(file, where | {part: where[part] | changed})


def test_its_own_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    code, results = tmp_path / "code.py", tmp_path / "study/results/cpu.json"
    results.parent.mkdir(parents=True)
    git("init")
    monkeypatch.setenv("CNNFAMILY_COMMIT", "of a copy")
    assert compare.commit(results.parents[1]) == "of a copy"
    for file in (code, results):
        file.write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    results.write_text("2")
    (tmp_path / "notes").write_text("of nobody's")
    assert compare.commit(results.parents[1]) == head
    code.write_text("2")
    assert compare.commit(results.parents[1]) == f"{head}-dirty"


class Fake:
    """A side with steps of so many seconds that notes what it was asked."""

    def __init__(self, seconds: float):
        self.seconds, self.asked = seconds, []

    def burst(self, steps, timeout):
        self.asked.append(steps)
        return {"seconds": self.seconds * steps}


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 1500), (0.4, 4), (7.0, 1)])
def test_a_burst_takes_about_the_time_it_should(seconds, steps):
    fake = Fake(seconds)
    assert compare.steps_for(fake, 1.5, 60) == steps
    assert sum(fake.asked) * seconds < max(7.5, seconds * 2)


def test_a_side_that_ends_is_a_cell_and_no_end(monkeypatch, tmp_path):
    script = """
import json, sys
job = json.loads(sys.argv[1])
if job["side"] == "plain": sys.exit("no /home/someone/such thing")
print(json.dumps({"ready": 0.1}), flush=True)
for line in sys.stdin:
    if job["side"] == "eager": print(json.dumps({"failed": "out of memory"}), flush=True)
    else: print(json.dumps({"seconds": 0.5, "loss": 1.0}), flush=True)
"""
    (tmp_path / "side.py").write_text(script)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    jobs = {name: {"side": name, "batch": 4} for name in ("ours", "plain", "eager")}
    arguments = argparse.Namespace(start_timeout=60, seconds=0.5, rounds=2)
    found = compare.measure(jobs, dict.fromkeys(jobs, sys.executable), arguments)
    assert found["ours"] == {"images_per_second": [8.0, 8.0], "start_seconds": 0.1, "steps": 1, "loss": 1.0}
    assert found["eager"] == {"failed": "out of memory"}
    assert found["plain"] == {"failed": "ended with status 1; no such thing"}


def test_results_name_no_folders():
    given = ["--models=lenet5", "--out=/home/me/x.json", "--out=results/y.json", "--torch-python", "/opt/env/bin/python"]
    command = compare.command_line(given)
    assert command == (
        "python experiments/speed/compare.py --models=lenet5 --out=x.json --out=results/y.json --torch-python python"
    )


def test_peak_memory_stands_beside_torchs_where_a_device_counts_it():
    assert side.peak_bytes("ours") == {}, "a CPU counts none"
    assert "GiB" not in compare.table(STUDY)
    sides = cells(ours=[10], eager=[8], compile=[9])
    for name, peak in {"ours": 3, "eager": 4, "compile": 2}.items():
        sides[name]["peak_bytes"] = peak * 2**30
    rows = [row_of("resnet50", "float32", "train", sides), row_of("resnet50", "bfloat16", "train", cells(ours=[20]))]
    head, _, line = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in compare.table(STUDY | {"rows": rows}).splitlines()
        if line[:1] == "|"
    )
    line = dict(zip(head, line, strict=True))
    assert line["ours float32"] == "10.0 (10.0 to 10.0), 3.00 GiB"
    assert line["ours bfloat16"] == "20.0 (20.0 to 20.0)"
    assert (line["peak memory, ours / torch, float32"], line["peak memory, ours / torch, bfloat16"]) == ("1.50", "")


def test_several_networks_get_ready_at_once(monkeypatch, tmp_path):
    asked = []

    def measure(jobs, pythons, arguments):
        asked.append([(job["model"], job["side"]) for job in jobs.values()])
        assert pythons.keys() == jobs.keys()
        return {name: {"images_per_second": [len(job["model"])], "steps": 1} for name, job in jobs.items()}

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "describe", lambda *_: {"machine": STUDY["machine"], "versions": {"jax": "0.10.2"}})
    given = ["compare.py", "--models=lenet5,vgg16,resnet50", "--dtypes=float32", "--modes=train", "--sides=ours,eager"]
    monkeypatch.setattr(sys, "argv", [*given, "--together=2", f"--out={tmp_path / 'x.json'}"])
    compare.main()
    ours_and_eager = [[(name, "ours"), (name, "eager")] for name in ("lenet5", "vgg16", "resnet50")]
    assert asked == [ours_and_eager[0] + ours_and_eager[1], ours_and_eager[2]]
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert {row["model"]: row["sides"]["eager"]["images_per_second"] for row in rows} == {
        "lenet5": [6],
        "vgg16": [5],
        "resnet50": [8],
    }
    compare.main()
    assert len(asked) == 2, "nothing is measured twice"


def test_two_runs_are_held_together_bit_by_bit(monkeypatch, tmp_path):
    script = """
import json, os, sys
job, steps = json.loads(sys.argv[1]), 0
flags = os.environ["XLA_FLAGS"]
if "exclude" in flags: sys.exit("Unknown flag")
print(json.dumps({"ready": 0.1}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    steps += asked["steps"]
    digest = f"after {steps} steps, {'the same' if 'deterministic_ops' in flags else os.getpid()}"
    print(json.dumps({"seconds": asked["steps"] * (0.2 if "ops" in flags else 0.1), "loss": 1.0, "digest": digest}), flush=True)
"""
    (tmp_path / "side.py").write_text(script)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    job = {"model": "lenet5", "dtype": "float32", "mode": "train", "batch": 4, "resolution": 32}
    arguments = argparse.Namespace(start_timeout=60, rounds=2, steps=3)
    found = determinism.measure(job, list(determinism.FLAGS), arguments)
    assert {form: cell.get("same_bits") for form, cell in found.items()} == {
        "as it is": False,
        "deterministic": True,
        "no nondeterministic": None,
    }
    assert found["deterministic"]["digests"] == ["after 7 steps, t"] * 2
    row = job | {"rounds": 2, "steps": 3, "commit": "abc", "forms": found}
    text = determinism.table({"machine": STUDY["machine"], "versions": STUDY["versions"], "rows": [row]})
    assert "| lenet5 | float32 | 4 x 32 | as it is | no | 100.0 (100.0 to 100.0) | 1.00 (1.00 to 1.00) |  |" in text
    assert "| lenet5 | float32 | 4 x 32 | deterministic | yes | 200.0 (200.0 to 200.0) | 2.00 (2.00 to 2.00) |  |" in text
    assert "failed: ended with status 1; Unknown flag" in text


def test_the_state_is_the_same_to_the_bit_in_equal_runs(monkeypatch):
    def digest_of(seed: int) -> str:
        answers = []
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"steps": 1}\n{"steps": 2, "digest": true}\n'))
        monkeypatch.setattr(side.np.random, "default_rng", lambda _: np.random.Generator(np.random.PCG64(seed)))
        job = {"side": "ours", "model": "lenet5", "dtype": "float32", "mode": "train", "batch": 2, "resolution": 32}
        side.run(argparse.Namespace(**job), answers.append)
        assert "digest" not in answers[1]
        return answers[2]["digest"]

    with jax.numpy_dtype_promotion("standard"):
        assert digest_of(0) == digest_of(0) != digest_of(1)


def test_optimized_inference_beside_the_folded_network(monkeypatch, tmp_path, capsys):
    def durations(call, *, seconds):
        call()
        return np.array([next(times)])

    times = iter((0.5, 0.25, 0.8, 0.2, 0.4, 0.4))  # before and after, of three rounds
    monkeypatch.setattr(optimized.ceilings, "durations", durations)
    given = ["optimized.py", "--models=lenet5", "--dtypes=float32", "--batch=2", "--rounds=3"]
    monkeypatch.setattr(sys, "argv", [*given, f"--out={tmp_path / 'x.md'}"])
    with jax.numpy_dtype_promotion("standard"):
        optimized.main()
    line = (tmp_path / "x.md").read_text().splitlines()[-1]
    assert line == capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:5] == ["lenet5", "float32", "4 (2 to 5)", "8 (5 to 10)", "2.00 (1.00 to 4.00)"]
    assert float(cells[5]) < 1e-5
