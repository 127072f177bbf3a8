"""python train.py CONFIG --plan TARGET: the plan of a run, or a search for the best one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product

import jax

from s1jax.config import Remat
from s1jax.device_memory import GIB
from s1jax.model.config import QwenConfig
from s1jax.paths import any_path, write_whole
from s1jax.planning.hardware import PlanError, Target, parse_target
from s1jax.planning.report import assumptions, describe, ranking
from s1jax.planning.training import TrainingPlan, plan_run, resolve_architecture
from s1jax.training.config import TrainConfig

DOES_NOT_FIT = 3
"""Exit status of a plan that was made, and says no."""
_SEARCHED_REMAT: tuple[Remat, ...] = ("full", "gate", "offload", "heads", "dots")
"""From the policy that needs least memory to the one that needs most."""
_BLOCK_EIGHTHS = (8, 6, 4, 3, 2, 1)
"""Of `data.block_size`, the shares that a search tries in turn."""


def plan(config: TrainConfig) -> int:
    """Print the plan that the configuration asks for and write `plan.output`; returns the exit status.

    The status is 0 if the run fits, 3 if it does not. Raises ValueError or a subclass with what to change.
    """
    assert config.plan.target is not None
    target = parse_target(config.plan.target)
    architecture = resolve_architecture(config.model.path)
    devices = target.devices()
    if config.plan.search:
        plans = _search(config, target, devices, architecture)
    else:
        plans = [plan_run(config, target, devices, architecture)]
    print(describe(plans[0]))
    print(assumptions(config.plan, target, plans[0]))
    if config.plan.search:
        print("\n" + ranking(plans))
    if config.plan.output:
        content = [{**asdict(p), "fits": p.fits, "peak_bytes": p.peak_bytes} for p in plans]
        write_whole(any_path(config.plan.output), json.dumps(content, indent=2) + "\n")
    return 0 if plans[0].fits else DOES_NOT_FIT


def _search(
    config: TrainConfig, target: Target, devices: Sequence[jax.Device], architecture: QwenConfig
) -> list[TrainingPlan]:
    """Plans for remat policies, accumulations and meshes: those that fit first, the fastest first.

    Where a policy does not fit, those that need more are not tried: a compilation for TPU takes minutes.
    All are tried with `data.block_size`; only if none fits, with three quarters of it, a half, and so on.
    """
    for numerator in _BLOCK_EIGHTHS:
        block_size = config.data.block_size * numerator // 8
        longest_row = config.data.max_row_length if numerator == _BLOCK_EIGHTHS[0] else None
        at_block = replace(config, data=replace(config.data, block_size=block_size, max_row_length=longest_row))
        plans = _plans_at(at_block, target, devices, architecture)
        if any(p.fits for p in plans):
            break
    if not plans:
        raise PlanError(f"{target}: no mesh, remat policy and accumulation could be compiled")
    return sorted(plans, key=lambda p: (not p.fits, p.seconds))


def _plans_at(
    config: TrainConfig, target: Target, devices: Sequence[jax.Device], architecture: QwenConfig
) -> list[TrainingPlan]:
    plans = []
    tensors = [tensor for tensor in (1, 2, 4, 8) if target.devices_per_host % tensor == 0]
    for tensor, accumulation in product(tensors, (1, 2)):
        for remat in _SEARCHED_REMAT:
            variant = replace(
                config,
                model=replace(config.model, remat=remat, remat_by_length=None),
                mesh=replace(config.mesh, data=1, fsdp=-1, tensor=tensor),
                training=replace(config.training, gradient_accumulation_steps=accumulation),
            )
            name = f"block_size {config.data.block_size}, tensor {tensor}, remat {remat}, accumulation {accumulation}"
            try:
                plans.append(plan_run(variant, target, devices, architecture, largest_only=True))
            except ValueError as error:
                print(f"{name}: {error}", flush=True)
                break
            print(f"{name}: {plans[-1].peak_bytes / GIB:.1f} GiB, {plans[-1].seconds / 60:.1f} min", flush=True)
            if not plans[-1].fits:
                break
    return plans
