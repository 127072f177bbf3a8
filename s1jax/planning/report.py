"""A plan in words and columns."""

from collections.abc import Sequence

from s1jax.config import PlanSection
from s1jax.device_memory import GIB
from s1jax.planning.hardware import Target
from s1jax.planning.storage import Storage
from s1jax.planning.training import TrainingPlan

_COLUMNS = (
    "  rows x length  steps  remat      GiB = params   optim   batch    temp  FLOP ratio"
    "   s/step = compute  memory + exposed"
)


def ranking(plans: Sequence[TrainingPlan]) -> str:
    """A line for each plan, in the order given."""
    lines = ["ranked (those that fit first, by time):"]
    for p in plans:
        verdict = "fits" if p.fits else "does not fit"
        mesh = " x ".join(map(str, p.mesh.values()))
        lines.append(
            f"  block_size {p.block_size}, mesh {mesh}, remat {p.remat}, accumulation {p.gradient_accumulation_steps}: "
            f"{p.peak_bytes / GIB:.1f} GiB ({verdict}), {p.seconds / 60:.1f} min"
        )
    return "\n".join(lines)


def describe(plan: TrainingPlan) -> str:
    """A table of the run's shapes, what the largest exchanges, and the verdict."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.target}, {mesh}, accumulation {plan.gradient_accumulation_steps}",
        f"examples: {plan.lengths}; padding {plan.padding_share:.1%}",
        _COLUMNS,
    ]
    for shape in plan.shapes:
        memory, seconds = shape.memory, shape.estimate
        parts = (memory.total, memory.parameters, memory.optimizer, memory.batch, memory.temporaries)
        total, params, optimizer, batch, temporaries = (f"{part / GIB:7.2f}" for part in parts)
        lines.append(
            f"{shape.rows:6} x {shape.length:6} {shape.steps:6}  {shape.remat:7}"
            f" {total} {params} {optimizer} {batch} {temporaries} {shape.flop_ratio:11.3f}"
            f" {seconds.total:8.2f} {seconds.compute:9.2f} {seconds.memory:7.2f} {seconds.exposed:9.2f}"
        )
    largest = plan.shapes[0]
    lines.append(f"collectives of one step, {largest.rows} x {largest.length}:")
    lines += [
        f"  {c.kind:<18} {c.runs:>6} times, {c.num_bytes / GIB:>8.2f} GiB, among {len(c.group)} devices"
        for c in largest.collectives
        if c.num_bytes > GIB / 100
    ]
    lines.append("kernels: " + (", ".join(f"{name} x {n}" for name, n in largest.kernels.items()) or "none"))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"memory: {plan.peak_bytes / GIB:.1f} of {plan.usable_bytes / GIB:.1f} GiB: {verdict}")
    if on_host := max(shape.memory.on_host for shape in plan.shapes):
        lines.append(
            f"in the host's memory: {on_host / GIB:.1f} GiB for each device, moved there and back in "
            f"{largest.estimate.host:.2f} s/step"
        )
    lines.append(f"FLOPs of the program over the model's, averaged over the steps: {plan.flop_ratio:.3f}")
    lines.append(f"{plan.steps} steps: {plan.seconds / 60:.1f} min")
    if plan.storage:
        lines += _storage(plan.storage)
        lines.append(f"steps and writing together: {plan.run_seconds / 60:.1f} min")
    return "\n".join(lines)


def _storage(storage: Storage) -> list[str]:
    return [
        f"{storage.num_checkpoints} checkpoints of {storage.checkpoint_bytes / 1e9:.1f} GB: "
        f"{storage.checkpoint_seconds / 60:.1f} min each beside the steps, of which the run waits for "
        f"{storage.waited_seconds / 60:.1f} min in all",
        f"export of {storage.export_bytes / 1e9:.1f} GB: {storage.export_seconds / 60:.1f} min",
    ]


def device_hours(seconds: float, section: PlanSection, target: Target) -> str:
    """What so long on all devices comes to, and costs if a price is known."""
    hours, price = seconds / 3600 * target.num_devices, section.price_per_device_hour
    cost = "" if price is None else f", {hours * price:.2f} at {price:g} a device-hour"
    return f"{hours:.2f} device-hours{cost}"


def assumptions(section: PlanSection, target: Target, plan: TrainingPlan) -> str:
    """What the run costs, and all that the figures rest on."""
    hardware = target.hardware
    return "\n".join(
        [
            device_hours(plan.run_seconds, section, target),
            f"assumed: matrix products and attention kernels at {section.efficiency:.0%} of "
            f"{hardware.peak_flops / 1e12:.0f} TFLOP/s; memory at {hardware.memory_bandwidth / 1e12:.2f} TB/s; "
            f"links at {hardware.link_bandwidth / 1e9:.0f} GB/s in a host or slice and "
            f"{hardware.network_bandwidth / 1e9:.0f} GB/s a device between hosts, to the host's memory "
            f"{hardware.host_bandwidth / 1e9:.0f} GB/s; collectives hidden behind what the "
            "compiler put beside them, moving to the host and back behind arithmetic, as far as it lasts.",
            f"not counted: start, compilation ({len(plan.shapes)} programs)"
            + ("" if plan.storage else ", checkpoints, export (plan.storage_gigabytes_per_second)"),
        ]
    )
