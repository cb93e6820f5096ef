"""Figures of the benchmark fit together, nothing of them asks the clock, and times go to the layers that took them."""

import contextlib
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from cnnfamily import benchmark, ceilings, profile_layers
from cnnfamily.ceilings import Ceilings
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, onednn
from cnnfamily.profile_layers import INPUTS, UNKNOWN, UPDATE, LayerTime
from cnnfamily.summary import summarize

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_compilation_cache_dir",
)
FIELDS = (
    *("name", "network", "mode", "dtype", "batch", "resolution", "params", "macs", "steps", "images_per_second"),
    *("milliseconds", "milliseconds_low", "milliseconds_high"),
    *("trace_seconds", "compile_seconds_cold", "compile_seconds_cached"),
    *("program_bytes", "device_peak_bytes", "bytes_accessed", "matrix_share", "bandwidth_share", "by_layer"),
)


@pytest.fixture(scope="module")
def found():
    """What `--json` gives of LeNet-5, by layer; the settings of the compilation cache before and after; and the text."""
    before = [getattr(jax.config, name) for name in SETTINGS]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(benchmark, "measure_ceilings", lambda dtype, mesh: Ceilings(2e9, 1e9))
        benchmark.main(["lenet5", "--steps=4", "--by-layer", "--json", "--batch=8"])
    return json.loads(out.getvalue()), before, [getattr(jax.config, name) for name in SETTINGS]


def test_json_has_every_field(found):
    result = found[0]
    assert result["jax"] == jax.__version__
    assert result["devices"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    assert (result["flops_per_second"], result["bytes_per_second"]) == (2e9, 1e9)
    assert [(row["name"], row["mode"]) for row in result["networks"]] == [("lenet5", "train"), ("lenet5", "infer")]
    for row in result["networks"]:
        assert tuple(row) == FIELDS
        assert (row["network"], row["dtype"], row["batch"], row["resolution"]) == ("LeNet5", "float32", 8, 32)
        assert (row["steps"], row["params"], row["macs"]) == (4, 61_706, 416_520)


def test_figures_fit_together(found):
    for row in found[0]["networks"]:
        seconds = row["milliseconds"] / 1e3
        assert row["images_per_second"] == pytest.approx(8 / seconds)
        assert 0 < row["milliseconds_low"] <= row["milliseconds"] <= row["milliseconds_high"]
        flops = {"train": 6, "infer": 2}[row["mode"]] * 416_520
        assert row["matrix_share"] == pytest.approx(flops * row["images_per_second"] / 2e9)
        assert row["bandwidth_share"] == pytest.approx(row["bytes_accessed"] / seconds / 1e9)
        assert row["bytes_accessed"] > 8 * 32 * 32  # the images, to begin with
        assert all(row[f"compile_seconds_{kind}"] > 0 for kind in ("cold", "cached"))
    train, infer = found[0]["networks"]
    parameters = 4 * 61_706
    assert infer["program_bytes"] > parameters  # on each of the devices
    assert train["program_bytes"] > 2 * parameters  # and their momentum
    assert train["program_bytes"] < 20 * parameters


def test_the_compilation_cache_is_as_before(found):
    assert found[1] == found[2]
    with pytest.raises(KeyError), benchmark.empty_compilation_cache():
        assert jax.config.jax_compilation_cache_dir != found[1][-1]
        raise KeyError
    assert [getattr(jax.config, name) for name in SETTINGS] == found[1]


def test_the_second_compilation_comes_out_of_the_cache():
    program, events = benchmark.inference(create_model("lenet5"), 8), []

    def listen(event, **_):
        events.append(event.rsplit("/", 1)[-1])

    jax.monitoring.register_event_listener(listen)
    try:
        for _ in range(2):  # each begins with an empty one
            benchmark.compile_seconds(program)
            found = [event for event in events if event in ("cache_misses", "cache_hits")]
            programs = len(found) // 2
            assert found == ["cache_misses"] * programs + ["cache_hits"] * programs
            assert programs > 0
            events.clear()
    finally:
        jax.monitoring.unregister_event_listener(listen)


def test_by_layer_names_layers_and_shares_sum_to_one(found):
    layers = {layer.name for layer in summarize("lenet5").layers}
    for row in found[0]["networks"]:
        times = {layer["name"]: layer for layer in row["by_layer"]}
        assert sum(layer["forward"] + layer["backward"] for layer in times.values()) == pytest.approx(1)
        assert set(times) <= layers | {"LeNet5", UPDATE, INPUTS, UNKNOWN}
        assert len(layers & set(times)) >= 4
        assert min(min(layer["forward"], layer["backward"]) for layer in times.values()) >= 0
        backward = sum(layer["backward"] for layer in times.values())
        assert (backward > 0) == (row["mode"] == "train")
        assert (UPDATE in times) == (row["mode"] == "train")
    assert row["by_layer"] == sorted(row["by_layer"], key=lambda layer: -(layer["forward"] + layer["backward"]))


@pytest.mark.full
def test_inference_and_training_are_the_products_own():
    network = create_model("lenet5")
    one, two = (benchmark.inference(network, 4, mesh=mesh_of(devices)) for devices in (1, 2))
    one.compile()
    two.compile()
    variables, images = one.arguments
    assert np.ptp(images) > 200, "random images"
    normalised = (np.asarray(images, np.float32) / 255 - np.float32(0.449)) / np.float32(0.226)
    np.testing.assert_allclose(one.step(), network.apply(variables, jnp.asarray(normalised)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one.step(), two.step(), rtol=1e-4, atol=1e-4)
    optimized = benchmark.inference(network, 4, mesh=mesh_of(2), mode="optimized")
    optimized.compile()
    np.testing.assert_allclose(optimized.step(), two.step(), rtol=1e-4, atol=1e-4)
    has_onednn = not onednn.missing("float32")
    assert ("__onednn$convolution" in optimized.compiled.as_text()) == has_onednn
    assert "__onednn$convolution" not in two.compiled.as_text()
    program = benchmark.training(network.clone(dtype="bfloat16"), 4, mesh=mesh_of(2))
    program.compile()
    before = program.arguments[0]
    _, metrics = program.step()
    assert np.isfinite(metrics["loss"])
    assert int(program.arguments[0].step) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "the state is donated"


def test_optimized_inference_by_layer(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda dtype, mesh: Ceilings(2e9, 1e9))
    benchmark.main(["lenet5", "--mode=optimized", "--steps=3", "--by-layer", "--json", "--batch=8"])
    (row,) = json.loads(capsys.readouterr().out)["networks"]
    assert row["mode"] == "optimized"
    assert {"c1", "c3", "c5"} <= {layer["name"] for layer in row["by_layer"]}


@pytest.mark.full
def test_training_by_onednn_by_layer(on_cpu):
    """In the profile a call of oneDNN has another name than in the program's text, and finds its layer all the same."""
    if missing := onednn.missing("float32"):
        pytest.skip(missing)
    network = create_model("mobilenet_v2", head_filters=64, stages=((1, 16, 1, 1), (2, 24, 1, 2)), num_classes=7)
    program = benchmark.training(network, 2, resolution=32, mesh=mesh_of(1), mode="onednn")
    program.compile()
    program.step()
    text = program.compiled.as_text()
    assert {"__onednn$matmul", "__onednn$convolution"} <= set(re.findall(r"__onednn\$\w+", text))
    rows = profile_layers.by_layer(program.step, text, "MobileNetV2", ["stem", "head"], steps=1)
    times = {row.name: row for row in rows}
    assert min(times["stem"].forward, times["head"].forward, times["head"].backward) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ceilings_are_positive(dtype):
    found = ceilings.measure_ceilings(dtype, mesh_of(1), seconds=1e-9, mebibytes=1)
    assert 0 < found.flops_per_second < 1e18
    assert 0 < found.bytes_per_second < 1e18


def test_durations_follow_the_clock(monkeypatch):
    clock = iter(np.arange(0, 1e6))  # one second a look
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(clock))
    calls = []
    assert ceilings.durations(lambda: calls.append(0), steps=7).tolist() == [1.0] * 7
    assert len(calls) == 7 + ceilings.WARM_UP_STEPS
    assert len(ceilings.durations(lambda: None, seconds=0.5)) == ceilings.FEWEST_STEPS
    assert len(ceilings.durations(lambda: None, seconds=20)) == 8  # three looks a step, two while it must go on


def test_text_fits_the_screen(found, monkeypatch, capsys):
    rows = iter(found[0]["networks"] * 2)
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda dtype, mesh: Ceilings(2e9, 1e9))
    monkeypatch.setattr(benchmark, "measure", lambda program, ceiling, **options: next(rows))
    benchmark.main(["lenet5*", "--batch=8"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"jax {jax.__version__}, jaxlib ")
    assert first.endswith("dtype float32, batch 8: 2.0 GFLOP/s and 1.0 GB/s measured")
    assert len(lines[1].split()) == 10
    assert max(map(len, lines)) <= 120
    assert [line.split()[:3] for line in lines if line.startswith("lenet5")] == [
        ["lenet5", mode, "32"] for mode in ("train", "infer") * 2
    ]
    row = found[0]["networks"][1] | {"by_layer": [{"name": "c1", "forward": 0.25, "backward": 0.5}], "program_bytes": None}
    assert benchmark.text_row(row).splitlines()[-1].split() == ["c1", "25.00%", "50.00%"]
    assert "recorded no instruction" in benchmark.text_row(row | {"by_layer": []})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lenet"], "unknown model 'lenet'; did you mean 'lenet5'"),
        (["nothing*"], "unknown model 'nothing\\*'"),
        (["lenet5", "--batch=12"], "--batch=12: expected a positive multiple of the 8 devices"),
        (["lenet5", "--batch=0"], "--batch=0: expected a positive multiple"),
        (["lenet5", "--batch=8", "--resolution=64"], "64 x 64"),
        (["lenet5", "--batch=8", "--steps=0"], "expected more than 0"),
        (["lenet5", "--batch=8", "--steps=9", "--seconds=2"], "not allowed with argument --steps"),
        (["lenet5", "--batch=8", "--seconds=0"], "expected more than 0"),
        (["lenet5", "--batch=8", "--seconds=nan"], "expected more than 0"),
        (["--dtype=int8"], "int8"),
        (["--by"], "--by"),
    ],
)
def test_errors_come_before_anything_is_measured(argv, message, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        benchmark.main(argv)


HLO = """\
HloModule jit_train_step, is_scheduled=true

%fused (param: f32[8]) -> f32[8] {
  %param = f32[8]{0} parameter(0)
  %inner = f32[8]{0} add(%param, %param), metadata={op_name="jit(train_step)/jvp(Net)/block1/conv/add" stack_frame_id=3}
  %later = f32[8]{0} multiply(%inner, %inner), metadata={op_name="jit(train_step)/jvp(Net)/block1/norm/mul"}
  ROOT %bitcast = f32[8]{0} bitcast(%later)
}

%caller (param.1: f32[8]) -> f32[8] {
  %param.1 = f32[8]{0} parameter(0)
  ROOT %fusion.0 = f32[8]{0} fusion(%param.1), kind=kLoop, calls=%fused
}

ENTRY %main (state: f32[8]) -> (f32[8], f32[8]) {
  %state = f32[8]{0} parameter(0), metadata={op_name="state[\\'x\\']"}
  %fusion.1 = f32[8]{0} fusion(%state), kind=kLoop, calls=%fused, backend_config={"outer_dimension_partitions":["2"]}
  %call.2 = f32[8]{0} call(%fusion.1), to_apply=%caller
  %convolution.3 = f32[8]{0} convolution(%call.2, %state), window={size=2x2 pad=1_1x1_1}
  %copy.4 = f32[8]{0} copy(%convolution.3)
  %transpose.5 = f32[8]{0} copy(%copy.4), metadata={op_name="jit(train_step)/transpose(jvp(Net))/block1/conv/transpose"}
  %copy.6 = f32[8]{0} copy(%state)
  ROOT %tuple.7 = (f32[8]{0}, f32[8]{0}) tuple(%transpose.5, %copy.6)
}
"""


def test_operations_of_a_literal_text():
    names = profile_layers.operation_names(HLO)
    assert names["inner"] == "jit(train_step)/jvp(Net)/block1/conv/add"
    for instruction in ("fusion.0", "fusion.1", "call.2"):  # from inside, the last one
        assert names[instruction] == "jit(train_step)/jvp(Net)/block1/norm/mul"
    for instruction in ("convolution.3", "copy.4"):  # from what uses it
        assert names[instruction] == "jit(train_step)/transpose(jvp(Net))/block1/conv/transpose"
    assert "copy.6" not in names
    assert "tuple.7" not in names


def test_times_go_to_layers():
    durations = {"fusion.1": 10.0, "call.2": 20.0, "convolution.3": 50.0, "inner": 10.0, "copy.6": 10.0}
    rows = profile_layers.attribute(durations, profile_layers.operation_names(HLO), "Net", ["block1/conv", "block1/norm"])
    assert rows == [
        LayerTime("block1/conv", 0.1, 0.5),
        LayerTime("block1/norm", pytest.approx(0.3), 0.0),
        LayerTime(UNKNOWN, 0.1, 0.0),
    ]
    assert profile_layers.attribute({}, {}, "Net", []) == []


@pytest.mark.parametrize(
    ("operation", "name", "backward"),
    [
        ("jit(train_step)/jvp(Net)/block1/conv/jit(product)/cond/branch_0_fun/dot_general", "block1/conv", False),
        ("jit(train_step)/transpose(jvp(Net))/block1/conv", "block1/conv", True),
        ("jit(train_step)/transpose(jvp(Net))/block1/cond/branch_1_fun/block1/conv/mul", "block1/conv", True),
        ("jit(train_step)/jvp(Net)/block1/add", "block1", False),
        ("jit(train_step)/jvp(Net)/conv/add", "Net", False),  # `conv` is a layer of block1 only
        ("jit(train_step)/vmap(jvp(Net))/reduce_max", "Net", False),
        ("jit(infer)/Net/block1/conv/dot_general", "block1/conv", False),
        ("jit(infer)/div", INPUTS, False),
        ("jit(train_step)/jvp(jit(log_softmax))/log", INPUTS, False),
        ("jit(train_step)/transpose(jvp())/mul", INPUTS, False),
        ("jit(train_step)/psum", UPDATE, False),
        ("", UNKNOWN, False),
    ],
)
def test_locating_an_operation(operation, name, backward):
    assert profile_layers.locate(operation, "Net", {"block1", "block1/conv"}) == (name, backward)


def test_an_instruction_counts_without_those_that_it_runs():
    events = [(0.0, 10.0, "while"), (1.0, 4.0, "body"), (2.0, 3.0, "inside"), (5.0, 7.0, "body"), (12.0, 13.0, "next")]
    assert profile_layers._own_times(events) == {"while": 5.0, "body": 4.0, "inside": 1.0, "next": 1.0}
