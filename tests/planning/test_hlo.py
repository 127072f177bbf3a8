"""What is read from a program's HLO against what the program was written to do."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from s1jax.data.packing import Batch
from s1jax.mesh import make_mesh
from s1jax.model.config import QwenConfig
from s1jax.model.flops import matmul_parameters
from s1jax.model.qwen import Qwen
from s1jax.planning.hlo import Program
from s1jax.planning.traffic import memory_traffic
from s1jax.planning.training import device_bytes
from s1jax.training.config import OptimizerSection
from s1jax.training.step import abstract_state, batch_sharding, compile_step, init_state
from tests.model.test_flops import matmul_flops
from tests.tiny import QWEN2

EVEN = tuple(range(0, 16, 2))


def compiled(function: Any, *arguments: Any) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


@pytest.mark.parametrize("remat", [False, True])
def test_products_in_loops_are_counted_as_often_as_they_run(remat: bool) -> None:
    weights, x = jnp.ones((7, 64, 64)), jnp.ones((32, 64))

    def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jnp.tanh(x @ weight) @ weight), None

    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    gradient = jax.grad(lambda w: jax.lax.scan(body, x, w)[0].sum())
    jaxpr = jax.make_jaxpr(gradient)(weights).jaxpr
    assert compiled(gradient, weights).dot_flops == matmul_flops(jaxpr) >= 7 * 6 * 2 * 32 * 64 * 64


def test_collectives_are_found_with_their_groups_and_sizes() -> None:
    mesh = make_mesh(1, 8, 2)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("fsdp", "tensor"),
        out_specs=PartitionSpec(None, "tensor"),
        check_vma=False,
    )
    def exchange(local: jax.Array) -> jax.Array:
        whole = jax.lax.psum(jax.lax.all_gather(local, "tensor", axis=1, tiled=True), "fsdp")
        return jax.lax.psum_scatter(whole, "tensor", scatter_dimension=1, tiled=True)

    program = compiled(exchange, jax.ShapeDtypeStruct((64, 32), jnp.float32))
    found = {(c.kind, c.group): (c.runs, c.num_bytes) for c in program.collectives}
    part = 8 * 32 * 4  # 64 rows over 8 shards, gathered along the 32 columns.
    assert found["all-gather", (0, 1)] == (1, part)
    assert found["all-reduce", EVEN] == (1, part)
    assert found["reduce-scatter", (0, 1)] == (1, part)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("[8,2]<=[16]", (0, 1)),
        ("[2,8]<=[8,2]T(1,0)", EVEN),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("mesh['axis_0'=8,'axis_1'=2,'axis_2'=1] {'axis_0'}", EVEN),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=8], device_ids=([8,2]T(1,0)) {'axis_1'}", (0, 1)),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", tuple(range(16))),
    ],
)
def test_groups_are_read_in_every_notation(groups: str, expected: tuple[int, ...]) -> None:
    text = (
        "ENTRY %main (a: f32[4]) -> f32[8] {\n  %a = f32[4]{0} parameter(0)\n"
        f"  ROOT %g = f32[8]{{0}} all-gather(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}\n}}\n"
    )
    (collective,) = Program(text).collectives
    assert (collective.group, collective.num_bytes) == (expected, 32)


START = "%{0} = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%a), replica_groups=[8,2]<=[16], dimensions={{0}}"
DONE = "%{0}.done = f32[8]{{0}} all-gather-done(%{0})"
ADD = "%add.{0} = f32[4]{{0}} add(%a, %a)"
REDUCE = "%r{0} = f32[4]{{0}} all-reduce(%a), replica_groups=[8,2]<=[16], to_apply=%sum"
SCHEDULES = {
    "nothing beside it": ([START.format("x"), DONE.format("x"), ADD.format(0)], 10),
    "less beside it": ([START.format("x"), ADD.format(0), DONE.format("x"), ADD.format(1)], 6),
    "enough beside it": ([START.format("x"), *(ADD.format(i) for i in range(3)), DONE.format("x")], 0),
    "in one piece": ([ADD.format(0), REDUCE.format(0), ADD.format(1)], 3),
    "two, one after the other": (
        [START.format("x"), START.format("y"), ADD.format(0), DONE.format("x"), ADD.format(1), DONE.format("y")],
        6 + 6,
    ),
    "the first one's time is the second one's, too": (
        [START.format("x"), ADD.format(0), REDUCE.format(0), ADD.format(1), DONE.format("x")],
        6 + 3,
    ),
}


@pytest.mark.parametrize(("schedule", "seconds"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("trips", [None, 7])
def test_what_a_schedule_waits_for(schedule: list[str], seconds: int, trips: int | None) -> None:
    """An addition takes 4 seconds, a gather 10, a sum over devices 3; the whole once, or as a loop's body."""
    lines = ["HloModule m", "", "%body (a: f32[4]) -> f32[4] {", "  %a = f32[4]{0} parameter(0)"]
    lines += [*(f"  {operation}" for operation in schedule), "  ROOT %b = f32[4]{0} bitcast(%a)", "}", ""]
    how = "call(%a), to_apply=%body"
    if trips:
        how = f'while(%a), condition=%more, body=%body, backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    lines += ["ENTRY %main (a: f32[4]) -> f32[4] {", "  %a = f32[4]{0} parameter(0)", f"  ROOT %o = f32[4]{{0}} {how}"]
    program = Program("\n".join([*lines, "}"]))
    waited = program.waited(
        lambda instruction, _: 4.0 * (instruction.opcode == "add"),
        lambda collective: 3.0 if collective.kind == "all-reduce" else 10.0,
    )
    assert waited == seconds * (trips or 1)


def test_text_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        Program("HloModule nothing")


def test_traffic_counts_each_operand_once_and_of_stacked_weights_the_slice() -> None:
    weights, x = jnp.ones((5, 256, 256)), jnp.ones((4, 256))
    assert memory_traffic(compiled(lambda x, w: x @ w, x, weights[0])).num_bytes == 4 * (256 * 256 + 2 * 4 * 256)
    scanned = memory_traffic(compiled(lambda w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], weights)).num_bytes
    layer = 256 * 256 * 4
    # A layer's weights are read where they lie, or copied out of the stack (read, written) and read.
    assert 5 * layer <= scanned <= 5 * 3.2 * layer


def test_traffic_leaves_out_what_lies_on_the_chip() -> None:
    """A weight that a TPU copies into its own memory (S(1)) before the product is read from the main memory once."""
    text = """
HloModule prefetched

ENTRY %main (x: f32[8,256], w: f32[256,512]) -> f32[8,512] {
  %x = f32[8,256]{1,0:T(8,128)} parameter(0)
  %w = f32[256,512]{1,0:T(8,128)} parameter(1)
  %start = (f32[256,512]{1,0:T(8,128)S(1)}, f32[256,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %near = f32[256,512]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %y = f32[8,512]{1,0:T(8,128)} dot(%x, %near), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert memory_traffic(Program(text)).num_bytes == 4 * (256 * 512 + 8 * 256 + 8 * 512)


def test_a_small_run_has_the_planned_memory_and_arithmetic() -> None:
    """What a plan says of parameters, moments and arithmetic, against the arrays and the jaxpr of a real step."""
    mesh = make_mesh(1, 8, 2)
    model = Qwen(QwenConfig.from_hf({**QWEN2, "num_hidden_layers": 4}), dtype=jnp.float32, remat="full")
    state = abstract_state(model, OptimizerSection(), mesh)
    step: Any = compile_step(model, OptimizerSection(), 10, mesh)
    ids = np.ones((1, 16, 128), np.int32)
    positions, lengths = np.broadcast_to(np.arange(128, dtype=np.int32), ids.shape), np.full((1, 16, 1), 128, np.int32)
    batch = Batch(ids, ids, positions, ids, lengths, ids.astype(np.float32))
    placed = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)
    with jax.set_mesh(mesh):
        program = Program(step.lower(state, {}, batch).compile().as_text())
        jaxpr = jax.make_jaxpr(step)(state, {}, batch).jaxpr
        real, _ = step(init_state(model, OptimizerSection(), mesh, model.init(jax.random.key(0), mesh)), {}, placed)
    for planned, arrays in ((state.params, real.params), (state.optimizer, real.optimizer)):
        on_device = sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(arrays))
        assert device_bytes(planned) == on_device
    # XLA leaves out the products of recomputation that nothing needs, and no other.
    per_device = matmul_flops(jaxpr) / mesh.size
    assert 0.85 * per_device <= program.dot_flops <= per_device
    assert program.dot_flops >= 6 * matmul_parameters(model.config) * ids.size / mesh.size
