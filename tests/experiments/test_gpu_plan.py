"""`experiments.benchmark gpu-plan`: the reader of XLA's text, the estimate of time, the command."""

import json
import sys
import textwrap

import jax
import pytest
from rich.console import Console

from experiments import benchmark
from experiments.benchmarks.gpu import estimate, hlo, plan, targets
from experiments.benchmarks.gpu.hlo import Kernel, Launches, Step
from imp_jax.errors import UserError

H100 = targets.GPUS["h100"]

# ruff: noqa: E501 (lines of XLA's text are long)
HLO = textwrap.dedent("""\
    HloModule jit_scan_steps, is_scheduled=true

    %product (parameter_0: f32[8,16], parameter_1: f32[16,4]) -> f32[8,4] {
      %parameter_0 = f32[8,16]{1,0} parameter(0)
      %parameter_1 = f32[16,4]{1,0} parameter(1)
      ROOT %dot = f32[8,4]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    }

    %take (parameter_0.1: u8[100,10], parameter_1.1: s32[]) -> f32[10] {
      %parameter_0.1 = u8[100,10]{1,0} parameter(0)
      %parameter_1.1 = s32[] parameter(1)
      %slice = u8[1,10]{1,0} dynamic-slice(%parameter_0.1, %parameter_1.1, %parameter_1.1), dynamic_slice_sizes={1,10}
      %bitcast = u8[10]{0} bitcast(%slice)
      ROOT %convert = f32[10]{0} convert(%bitcast)
    }

    %put (parameter_0.2: f32[100,10], parameter_1.2: f32[1,10], parameter_2.2: s32[]) -> f32[100,10] {
      %parameter_0.2 = f32[100,10]{1,0} parameter(0)
      %parameter_1.2 = f32[1,10]{1,0} parameter(1)
      %parameter_2.2 = s32[] parameter(2)
      ROOT %update = f32[100,10]{1,0} dynamic-update-slice(%parameter_0.2, %parameter_1.2, %parameter_2.2)
    }

    %sum (parameter_0.3: bf16[8,16]) -> f32[16] {
      %parameter_0.3 = bf16[8,16]{1,0} parameter(0)
      %convert.1 = f32[8,16]{1,0} convert(%parameter_0.3)
      %zero = f32[] constant(0)
      ROOT %reduce = f32[16]{0} reduce(%convert.1, %zero), dimensions={0}, to_apply=%add
    }

    %body (state: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
      %state = (s32[], f32[8,16]{1,0}, /*index=2*/f32[16,4]{1,0}) parameter(0)
      %number = s32[] get-tuple-element(%state), index=0
      %a = f32[8,16]{1,0} get-tuple-element(%state), index=1
      %b = f32[16,4]{1,0} get-tuple-element(%state), index=2
      %images = u8[100,10]{1,0} constant({...})
      %history = f32[100,10]{1,0} constant({...})
      %row = f32[1,10]{1,0} constant({...})
      %half = bf16[8,16]{1,0} constant({...})
      %fusion.dot = f32[8,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
      %fusion.take = f32[10]{0} fusion(%images, %number), kind=kLoop, calls=%take
      %fusion.put = f32[100,10]{1,0} fusion(%history, %row, %number), kind=kLoop, calls=%put
      %fusion.sum = f32[16]{0} fusion(%half), kind=kInput, calls=%sum
      %copy.1 = f32[16,4]{0,1} copy(%b)
      %x = f32[2,6,7,6]{3,2,1,0} constant({...})
      %k = f32[12,3,3,2]{3,2,1,0} constant({...})
      %g = f32[2,6,7,12]{3,2,1,0} constant({...})
      %conv.1 = (f32[2,6,7,12]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=3, custom_call_target="__cudnn$convForward"
      %conv.2 = (f32[2,6,7,6]{3,2,1,0}, u8[0]{0}) custom-call(%g, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=3, custom_call_target="__cudnn$convBackwardInput"
      %conv.3 = (f32[12,3,3,2]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, feature_group_count=3, custom_call_target="__cudnn$convBackwardFilter"
      %gemm = (f32[8,4]{1,0}, s8[0]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
      ROOT %next = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%number, %a, %b)
    }

    %condition (state.1: (s32[], f32[8,16], f32[16,4])) -> pred[] {
      %state.1 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
      ROOT %less = pred[] constant(true)
    }

    ENTRY %main (arg: f32[8,16], arg.1: f32[16,4]) -> f32[8,16] {
      %arg = f32[8,16]{1,0} parameter(0)
      %arg.1 = f32[16,4]{1,0} parameter(1)
      %first = s32[] constant(0)
      %begin = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%first, %arg, %arg.1)
      %while.1 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"66"}}
      ROOT %end = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
    }
""")


def test_the_kernels_of_a_step_are_those_of_the_loops_body():
    step = hlo.read_step(HLO)
    assert (step.trip_count, step.in_loop) == (66, True)
    kernels = {kernel.name: kernel for kernel in step.kernels}
    assert {name: kernel.kind for name, kernel in kernels.items()} == {
        "fusion.dot": "matmul",
        "fusion.take": "elementwise",
        "fusion.put": "elementwise",
        "fusion.sum": "reduction",
        "copy.1": "transpose",
        "conv.1": "convolution",
        "conv.2": "convolution",
        "conv.3": "convolution",
        "gemm": "matmul",
    }

    def numbers(name):
        return kernels[name].bytes_read, kernels[name].bytes_written, kernels[name].flops

    assert numbers("fusion.dot") == (4 * (8 * 16 + 16 * 4), 4 * 8 * 4, 2 * 8 * 16 * 4)
    assert numbers("fusion.take") == (10 + 4, 4 * 10, 0)  # one row of the images, and its number
    assert numbers("fusion.put") == (4 * 10 + 4, 4 * 10, 0)  # one row of the history
    assert numbers("fusion.sum") == (2 * 8 * 16, 4 * 16, 0)
    assert numbers("copy.1") == (4 * 64, 4 * 64, 0)
    assert numbers("gemm") == (4 * (8 * 16 + 16 * 4), 4 * 8 * 4, 2 * 8 * 16 * 4)


def test_the_products_of_convolutions_are_counted_with_padding():
    """Three groups of 2 input and 4 output channels: 2 × 6 × 7 pixels, each with 9 × 2 × 4 products per group."""
    kernels = {kernel.name: kernel for kernel in hlo.read_step(HLO).kernels}
    for name in ("conv.1", "conv.2", "conv.3"):
        kernel = kernels[name]
        assert kernel.flops == 2 * (2 * 6 * 7) * 9 * 2 * 4 * 3
        assert (kernel.window, kernel.groups, kernel.channels) == (3, 3, 2)
    assert kernels["conv.1"].blocks == 3  # one of 128 × 64 outputs per group
    assert [kernels[f"conv.{i}"].is_weight_gradient for i in (1, 2, 3)] == [False, False, True]


def test_a_program_without_a_loop_is_one_step():
    entry = HLO[HLO.index("ENTRY") :]
    text = HLO[: HLO.index("%body")] + entry.replace(
        "while(%begin), condition=%condition, body=%body", "tuple()"
    )
    text = text.replace("%end = ", "%copy.2 = f32[8,16]{0,1} copy(%arg)\n  ROOT %end = ")
    step = hlo.read_step(text.replace("ROOT   ROOT", "ROOT").replace("  ROOT %copy.2", "  %copy.2"))
    assert [kernel.name for kernel in step.kernels] == ["copy.2"]
    assert (step.trip_count, step.in_loop) == (None, False)


@pytest.mark.parametrize("text", ["", "HloModule of another kind", HLO.replace("calls=%take", "body=%take")])
def test_other_text_is_refused(text):
    with pytest.raises(hlo.UnknownTextError):
        hlo.read_step(text)


THUNKS = """\
001: kCopy         [source | next=002] kCopy
002: kWhile        [prev=001 | sink  ]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion
  body:
    000: kCommandBuffer [source | next=007]
        004: kCustomKernel [source | next=005] loop_add_fusion
        005: kCustomKernel [prev=004 | sink] gemm_fusion_dot
    006: kConvolution [source | next=007]
    007: kCustomKernel [prev=006 | sink] input_reduce_fusion
    000: kCommandBuffer [prev=007 | sink]
        008: kCustomKernel [source | sink] loop_add_fusion
009: kCopy         [source | sink]
"""


def test_the_launches_of_the_host_are_read_from_the_thunks():
    assert hlo.read_launches(THUNKS) == Launches(graphs=2, external_calls=1, kernels=2, loop_in_graph=False)
    in_graph = "000: kCommandBuffer [source | sink]\n" + textwrap.indent(THUNKS, "    ")
    assert hlo.read_launches(in_graph) == Launches(0, 0, 0, loop_in_graph=True)
    without_loop = "001: kGemm [source]\n002: kCustomKernel [sink]\n"
    assert hlo.read_launches(without_loop) == Launches(0, 1, 1, loop_in_graph=False)
    with pytest.raises(hlo.UnknownTextError, match="no thunk"):
        hlo.read_launches("something else")


def make_kernel(kind="elementwise", megabytes=100.0, **fields):
    return Kernel("k", kind, int(megabytes * 1e6), 0, **{"flops": 0, "dtype": "f32", **fields})


def test_the_time_of_kernels_follows_from_bytes_products_and_launches():
    seconds = estimate.estimate_kernel_seconds
    bandwidth = 0.9 * 3.352e12
    assert seconds(make_kernel(megabytes=1.0), H100) == pytest.approx(2.5e-6)
    assert seconds(make_kernel(), H100) == pytest.approx(1.5e-6 + 1e8 / bandwidth)
    assert seconds(make_kernel(megabytes=10.0), H100) == pytest.approx(1.5e-6 + 1e7 / bandwidth / 1.35)
    assert seconds(make_kernel("reduction"), H100) == pytest.approx(2.5e-6 + 1e8 / bandwidth / 0.7)
    convolution = make_kernel("convolution", flops=10**12, channels=64, window=3)
    assert seconds(convolution, H100) == pytest.approx(3e-6 + 1e12 / (0.25 * 494e12))
    half = seconds(convolution._replace(dtype="bf16"), H100) - 3e-6
    assert half == pytest.approx(1e12 / (0.25 * 989e12))
    grouped = convolution._replace(groups=6)
    assert seconds(grouped, H100, 3) - 3e-6 == pytest.approx(3 * (seconds(convolution, H100) - 3e-6))
    # 12 of 132 multiprocessors are busy
    wide = convolution._replace(window=32, blocks=12)
    assert seconds(wide, H100) - 3e-6 == pytest.approx(11 * 1e12 / (0.25 * 494e12))


def test_the_host_can_be_slower_than_the_gpu():
    step = Step((make_kernel(),) * 2, 10, in_loop=True)
    device_s = 2 * (1.5e-6 + 1e8 / (0.9 * 3.352e12))
    fast = estimate.estimate_images_per_second(step, Launches(0, 0, 0, True), 100, H100)
    assert fast == pytest.approx([0.65 * 100 / device_s, 100 / device_s, 1.35 * 100 / device_s])
    slow = estimate.estimate_images_per_second(step, Launches(10, 100, 10, False), 100, H100)
    assert slow.middle == pytest.approx(100 / (10 * 6e-6 + 100 * 8e-6 + 10 * 2.3e-6))


def test_rows_are_chosen_by_their_fields():
    assert plan.choose_rows(plan.DEFAULT_ROWS) == list(plan.DEFAULT_ROWS)
    choices = {"network": "resnet20", "members": 2, "batch_size": None, "dtype": "bfloat16", "form": None}
    rows = plan.choose_rows(plan.DEFAULT_ROWS, **choices)
    assert {(row.network, row.members, row.dtype) for row in rows} == {("resnet20", 2, "bfloat16")}
    assert {row.form for row in rows} == set(plan.FORMS)
    full = plan.choose_rows(plan.list_all_rows())
    # one member has one form; LeNet has no convolutions, and one batch size more
    assert len(full) == 3 * 3 * 2 * (1 + 2 * len(plan.FORMS)) + 4 * 2 * (1 + 2 * 2)
    for choices in ({}, {"members": 1}, {"batch_size": 60}, {"network": "lenet"}):
        for rows in map(lambda rows: plan.choose_rows(rows, **choices), (plan.DEFAULT_ROWS, full)):
            assert len({plan.describe_row(row) for row in rows}) == len(rows) > 0


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    monkeypatch.setattr(benchmark.devices, "use_one_device_per_cpu_core", lambda: None)
    benchmark.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gpu-plan", "--wheels=empty"],
            r"empty has no jax-cuda13-plugin .* pip install --no-deps --upgrade --target",
        ),
        (["gpu-plan", "--wheels=empty", "--network=lenet", "--form=grouped"], "no row of the table has these"),
        (["gpu-plan", "--out=missing/table.json"], "--out is 'missing/table.json', whose folder does not"),
        (["gpu-plan", "--rounds=3"], "--rounds is for lenet, midi, .*; gpu-plan does not use it"),
        (["table", "--install"], "--install is for gpu-plan; table does not use it"),
        (["conv4", "--steps=0"], "--steps is 0; it should be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        run_command(monkeypatch, *arguments)


def test_wheels_of_another_version_are_refused(tmp_path):
    for name in plan.WHEELS:
        folder = tmp_path / f"{name.replace('-', '_')}-0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    with pytest.raises(UserError, match=rf"of version {jax.__version__}"):
        plan.check_wheels(tmp_path)
    for name in plan.WHEELS:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {jax.__version__}\n"
        (tmp_path / f"{name.replace('-', '_')}-0.1.dist-info" / "METADATA").write_text(metadata)
    plan.check_wheels(tmp_path)


@pytest.mark.parametrize("gpu", targets.GPUS.values())
def test_the_description_of_a_gpu_has_what_puts_loops_into_graphs(gpu):
    text = targets.describe_target(gpu)
    assert text.count("{") == text.count("}")
    assert 'driver_version: "13.' in text
    assert 'runtime_version: "13.' in text
    assert f"core_count: {gpu.multiprocessors}" in text


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Return the plans of four programs by row, compiled in processes that see the wheels; skip without them."""
    wheels = plan.default_wheels_folder()
    try:
        plan.check_wheels(wheels)
    except UserError:
        pytest.skip(f"{wheels} has no wheels of JAX's GPU plugin (benchmark gpu-plan --install)")
    rows = [
        plan.Row("lenet", 6, 60, "float32", "vmapped"),
        plan.Row("resnet20", 6, 128, "bfloat16", "per_member"),
        plan.Row("resnet20", 6, 128, "bfloat16", "grouped"),
        plan.Row("resnet20", 6, 2048, "float32", "per_member"),
    ]
    out = tmp_path_factory.mktemp("plan") / "table.json"
    plan.print_plan(rows, "h100", wheels, str(out))
    table = json.loads(out.read_text())
    return {plan.Row(**row.pop("row")): row for row in table["rows"]}


def test_gpu_programs_stay_within_their_limits(plans):
    for row, numbers in plans.items():
        assert numbers["largest_window"] <= 7
        assert numbers["transposes"] <= (9 if row.form == "grouped" else 0)
        assert numbers["peak_gib"] < 75
        assert numbers["mflop_per_image"] >= 0.99 * numbers["least_mflop_per_image"]
        if (row.network, row.form) == ("resnet20", "per_member"):
            assert numbers["kernels"] <= 580
            assert numbers["convolutions"] == 6 * 56
        if row.form == "grouped":
            assert numbers["kernels"] <= 290
            assert numbers["convolutions"] == 56
        if row.dtype == "bfloat16" and row.form == "per_member":
            assert numbers["mbytes_per_image"] <= 6.5


def test_the_table_names_every_row_and_says_that_nothing_is_measured(plans, capsys):
    rows = [
        plan.Row("lenet", 6, 60, "float32", "vmapped"),
        plan.Row("resnet50", 1, 128, "bfloat16", "per_member"),
    ]
    made = [
        plan.Plan(row, 30, 20, 0, 0, 0, 0.2, 0.1, 1.0, 1.0, 0.5, 1, 1, False, estimate.Range(1.0, 2e3, 3e3))
        for row in rows
    ]
    Console(width=200).print(plan.make_table(made, H100))
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    for row in rows:
        assert plan.describe_row(row) in printed
    too_large = made[1]._replace(peak_gib=100.0, images_per_second=estimate.Range(1e6, 1e6, 1e6))
    (line,) = plan.describe_sweeps([*made, too_large], H100)
    assert line.startswith("tablec, resnet50, 0.46 billion images in bfloat16: ")
    assert line.endswith("predicted, not measured")
    hours = float(line.split(": ")[1].split(" h")[0])
    assert hours == pytest.approx(461e6 / 2e3 / 3600, rel=0.01)
