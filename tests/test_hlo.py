"""The reader of compiled programs, against programs whose cost is known by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_lite import collectives, hlo
from t5x_lite.hardware import CHIPS
from t5x_lite.sharding import make_mesh
from tests.tiny import tiny_config

TEXT = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (in: bf16[64,8]) -> bf16[16,8] {
  %in = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.9 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%in), channel_id=9, replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%add
  ROOT %slice = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,8}
}

%begin (p: f32[4,8]) -> f32[8,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%end (q: f32[4,8]) -> f32[8,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,8]{1,0} all-gather(%q), channel_id=7, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%condition (c: (s32[], f32[4,8])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %c = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%body (c.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %c.1 = (s32[]{:T(128)}, f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%c.1), index=1
  %g.1 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %g.2 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%end
  %dot = f32[4,8]{1,0} dot(%x, %g.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %out = (s32[], /*index=1*/f32[4,8]{1,0}) tuple(%next, %dot)
}

ENTRY %main (x.1: f32[4,8], y: bf16[64,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %y = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(1)
  %two = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%two)
  %carried = (s32[], f32[4,8]{1,0}) tuple(%start, %x.1)
  %scattered = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %while = (s32[], f32[4,8]{1,0}) while(%carried), condition=%condition, body=%body
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_loops_run_as_often_as_their_condition_says():
    module = hlo.Module(TEXT)
    loop = module.computations["main"]["while"]
    assert module.trips(module.computations["main"], loop) == 3  # 2, 3, 4
    stated = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}')  # fmt: skip  # noqa: E501
    assert hlo.flops(hlo.Module(stated)) == 12 * 2 * 4 * 8 * 8
    assert hlo.flops(module) == 3 * 2 * 4 * 8 * 8


def test_tpu_spellings_of_collectives():
    """A fused reduce-scatter, and a gather split over several fusions."""
    found = {c.kind: c for c in collectives.find(hlo.Module(TEXT), 8)}
    assert set(found) == {"all-gather", "reduce-scatter"}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.sent, gather.times) == (4 * 8 * 4 * 1, 3)
    assert gather.groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert (scatter.sent, scatter.times) == (64 * 8 * 2 * 3 / 4, 1)
    assert scatter.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_ways_of_writing_groups(written, groups):
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        "  %x = f32[8]{0} parameter(0)\n"
        "  ROOT %r = f32[8]{0} all-reduce(%x), channel_id=1, "
        f"replica_groups={written}, use_global_device_ids=true, to_apply=%add\n}}\n"
    )
    module = hlo.Module(text)
    (found,) = collectives.find(module, 4)
    assert found.groups.tolist() == groups
    n = len(groups[0])
    assert found.sent == 2 * 32 * (n - 1) / n


@pytest.mark.parametrize(
    "lhs, rhs, out, attributes, products",
    [
        # Products as the TPU compiler writes them: batch dimensions as windows.
        (
            (4, 7, 3, 5), (4, 9, 3, 5), (4, 3, 7, 9),
            "window={size=4x3 stride=3x2 lhs_dilate=4x3}, dim_labels=0b1f_0o1i->01bf",
            4 * 3 * 7 * 9 * 5,
        ),
        (
            (2, 7, 8), (8, 3, 5), (2, 7, 3, 5),
            "window={size=1x3 pad=0_0x2_2 rhs_reversal=0x1}, "
            "dim_labels=0bf_i1o->0b1f",
            2 * 7 * 3 * 5 * 8,
        ),
        ((6, 7), (7, 5), (6, 5), "dim_labels=bf_io->bf", 6 * 7 * 5),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(lhs, rhs, out, attributes, products):
    if "pad" in attributes:
        lhs, attributes = (2, 7, 1, 8), attributes.replace("0bf_i", "0b1f_i")
        rhs, attributes = (1, 8, 3, 5), attributes.replace("_i1o", "_0i1o")

    def shape(dims):
        return f"bf16[{','.join(map(str, dims))}]"

    text = (
        f"ENTRY %main (l: {shape(lhs)}, r: {shape(rhs)}) -> {shape(out)} {{\n"
        f"  %l = {shape(lhs)} parameter(0)\n  %r = {shape(rhs)} parameter(1)\n"
        f"  ROOT %c = {shape(out)} convolution(%l, %r), {attributes}\n}}\n"
    )
    assert hlo.flops(hlo.Module(text)) == 2 * products


# ---- real programs on eight virtual CPU devices ------------------------------


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(tiny_config(sharding=dict(data=2, fsdp=4)).sharding)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def parsed(program) -> hlo.Module:
    return hlo.Module(program.as_text())


def rows(program, mesh):
    module = parsed(program)
    found, _ = collectives.summary(collectives.find(module, 8), mesh, None)
    return {(r["kind"], r["axes"]): (r["calls"], r["bytes"]) for r in found}


def abstract(mesh, shape, *spec):
    where = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


def test_a_sum_over_one_axis(mesh):
    def f(x):
        return jax.lax.psum(x, "fsdp")

    shared = jax.shard_map(
        f, mesh=mesh, in_specs=P("data", "fsdp"), out_specs=P("data", None)
    )
    x = abstract(mesh, (16, 64), "data", "fsdp")
    # Each device holds [8, 16] float32 and sends 2 * 3/4 of it.
    assert rows(compiled(shared, x), mesh) == {
        ("all-reduce", "fsdp"): (1, 2 * 8 * 16 * 4 * 3 / 4)
    }


def test_gathers_in_a_scan_of_five(mesh):
    def layer(x, w):
        whole = jax.lax.all_gather(w, "fsdp", tiled=True)
        return x @ whole, None

    def f(x, ws):
        return jax.lax.scan(layer, x, ws)[0]

    shared = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(P("data"), P(None, "fsdp")),
        out_specs=P("data"),
        check_vma=False,
    )
    program = compiled(
        shared,
        abstract(mesh, (16, 64), "data"),
        abstract(mesh, (5, 64, 64), None, "fsdp"),
    )
    assert rows(program, mesh) == {("all-gather", "fsdp"): (5, 5 * 64 * 64 * 4 * 3 / 4)}
    assert hlo.flops(parsed(program)) == 5 * 2 * 8 * 64 * 64


def test_a_permutation_and_an_exchange(mesh):
    def f(x):
        around = [(i, (i + 1) % 4) for i in range(4)]
        y = jax.lax.ppermute(x, "fsdp", around)
        return jax.lax.all_to_all(y, "data", 0, 0, tiled=True)

    shared = jax.shard_map(
        f, mesh=mesh, in_specs=P("fsdp", "data"), out_specs=P("fsdp", "data")
    )
    found = rows(compiled(shared, abstract(mesh, (64, 16), "fsdp", "data")), mesh)
    held = 16 * 8 * 4
    assert found[("collective-permute", "fsdp")] == (1, held)
    assert found[("all-to-all", "data")] == (1, held / 2)


def test_flops_and_traffic_agree_with_xla_where_nothing_loops():
    def f(x, w):
        return jnp.einsum("bij,bjk->bik", x, w).sum(0) @ w[0]

    x, w = (jax.ShapeDtypeStruct((3, n, 64), jnp.float32) for n in (32, 64))
    program = compiled(f, x, w)
    module = parsed(program)
    assert hlo.flops(module) == 2 * 3 * 32 * 64 * 64 + 2 * 32 * 64 * 64
    cost: dict = program.cost_analysis()  # type: ignore[assignment]
    np.testing.assert_allclose(hlo.traffic(module), cost["bytes accessed"], rtol=0.05)


# ---- time on the network -----------------------------------------------------


def pod(shape, slices=1):
    """Devices of a TPU slice, as far as the network looks at them."""
    found = []
    for s in range(slices):
        for at in np.ndindex(*shape):
            coords = [*at, 0, 0][:3]
            found.append(types.SimpleNamespace(coords=coords, slice_index=s))
    return np.array(found, object)


def over(chip, devices, shape, names):
    grid = types.SimpleNamespace(devices=devices.reshape(shape), axis_names=names)
    return collectives.Network(CHIPS[chip], grid)  # type: ignore[arg-type]


def gather(size, groups):
    n = np.shape(groups)[1]
    return collectives.Collective("all-gather", size * (n - 1) / n, groups, 1)


def test_a_pod_gathers_over_all_its_links():
    """16 x 16 v5e: a result of S bytes takes S (n-1)/n over four links of 50 GB/s."""
    devices = pod((16, 16))
    network = over("v5e", devices, (16, 16), ("data", "fsdp"))
    whole = network.seconds(gather(1e9, np.arange(256)[None]))
    assert whole == pytest.approx(dict.fromkeys("xy", 1e9 * 255 / 256 / 200e9))
    one = network.seconds(gather(1e9, np.arange(256).reshape(16, 16)))
    assert one == pytest.approx({"y": 1e9 * 15 / 16 / 100e9})


def test_an_exchange_on_a_ring():
    """Of S bytes each, n^2 S / 4 byte-hops go over the 2 n links of a ring."""
    network = over("v5e", pod((16, 16)), (16, 16), ("data", "fsdp"))
    sent = collectives.Collective(
        "all-to-all", 1e9 * 15 / 16, np.arange(256).reshape(16, 16), 1
    )
    assert network.seconds(sent) == pytest.approx({"y": 1e9 * 15 / 16 * 16 / 8 / 50e9})


def test_a_line_that_does_not_wrap_has_half_the_rate():
    network = over("v5e", pod((4, 4)), (4, 4), ("data", "fsdp"))
    assert network.seconds(gather(1e9, np.arange(16).reshape(4, 4))) == pytest.approx(
        {"y": 1e9 * 3 / 4 / 50e9}
    )


def test_slices_meet_over_the_data_center():
    """Two slices: each takes the other's half in through all of its chips."""
    network = over("v5e", pod((16, 16), 2), (2, 256), ("data", "fsdp"))
    pairs = np.arange(512).reshape(2, 256).T
    assert network.seconds(gather(1e6, pairs)) == pytest.approx(
        {"network": 0.5e6 / 3.125e9}
    )
    both = network.seconds(gather(1e6, np.arange(512)[None]))
    assert both["network"] == pytest.approx(0.5e6 / 256 / 3.125e9)


def test_gpus_of_several_hosts():
    """NVLink carries 7/8 inside; the cards of a host share what comes from outside."""
    devices = np.array(
        [types.SimpleNamespace(process_index=i // 8) for i in range(16)], object
    )
    network = over("h100", devices, (16,), ("fsdp",))
    found = network.seconds(gather(1e9, np.arange(16)[None]))
    assert found["network"] == pytest.approx(1e9 / 2 / 8 / 50e9)
    assert found["nvlink"] == pytest.approx(1e9 * 7 / 8 / 450e9)
