"""
Several processes, one a GPU, started by PyTorch's own launcher (-- keeps it from taking our flags for its own):

    torchrun --nproc_per_node=8 -- train_dpo.py --init runs/stage1 --out runs/dpo

Every process holds the whole model and reads its share of the pictures of each step. Losses are divided by what all
processes read together, and gradients are added up once a step, when all micro-batches are through. So N processes
take the very step that one would take, also where the shares are uneven: there is no average over processes of
averages. With one process nothing here does anything.

With --shard a process keeps only its part of every weight, gradient and moment, and each layer's weights are brought
together when it is their turn (FSDP2, torch.distributed.fsdp.fully_shard); gradients are then added up after every
micro-batch. The step is the same.
"""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join():
    """Meets the other processes, if there are any, and takes a GPU of its own, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=1))  # evaluation waits for the slowest


def leave():
    """Parts from the other processes"""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait():
    """Until all processes are here"""
    if WORLD > 1:
        dist.barrier()


def all_sum(values):
    """The sum over all processes of a number or a () tensor, or of each value of a dict (the same keys everywhere)"""
    if WORLD == 1:
        return values
    if not isinstance(values, dict):
        return all_sum({"": values})[""]
    device = next((value.device for value in values.values() if torch.is_tensor(value)), "cpu")
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()])
    dist.all_reduce(sums)
    return {name: value.to(values[name].dtype) if torch.is_tensor(values[name]) else type(values[name])(value)
            for name, value in zip(values, sums)}


def all_max(number):
    """The largest over all processes"""
    return max(gather([number]))


def gather(value):
    """-> the lists, or dicts, of all processes as one"""
    if WORLD == 1:
        return value
    found = [None] * WORLD
    dist.all_gather_object(found, value)
    return {k: v for each in found for k, v in each.items()} if isinstance(value, dict) else sum(found, [])


def all_reduce_gradients(parameters):
    """Every gradient becomes the sum of all processes'; a process that read nothing brings zeros. Shards are sums
    already."""
    parameters = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if WORLD == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(has)
    used = [p for p, n in zip(parameters, has.tolist()) if n]
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for work in [dist.all_reduce(p.grad, async_op=True) for p in used]:
        work.wait()


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard(model):
    """Splits every weight over the processes, layer by layer; `token_logps` brings them together as it goes."""
    mesh = dist.init_device_mesh(model.device.type, (WORLD,))
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "token_logps")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)                              # the sum, not the mean
            module.set_force_sum_reduction_for_comms(True)                      # gloo knows no other way to get it


@contextlib.contextmanager
def unsharded(model):
    """While it lasts, every process has all weights of a sharded model, and may call its parts when and as often as it
    likes: to sample answers, of which each process has others. Moments and gradients stay in shards."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.set_reshard_after_forward(False)
        module.unshard()
    yield
    for module in parts:
        module.set_reshard_after_forward(True)
        module.reshard()


@contextlib.contextmanager
def full_weights_on_rank0(model):
    """While it lasts, a sharded model has all of its weights, on the CPU of the first process: to be written."""
    shards, full = [], {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()                                                    # reading alone leaves some together
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                shards.append((module, name, parameter))
                if parameter not in full:                                       # tied weights stay one
                    full[parameter] = torch.nn.Parameter(full_on_rank0(parameter.detach()))
                module._parameters[name] = full[parameter]
    yield
    for module, name, parameter in shards:
        module._parameters[name] = parameter


def whole(tensor):
    """A tensor of which each process may have a shard -> all of it, on every process"""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_on_rank0(tensor):
    """A DTensor -> all of it, on the CPU of the first process; the others get a 0. Other tensors as they are"""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return torch.zeros(()) if RANK else full.cpu()


def local(tensor):
    """A DTensor -> this process's shard; other tensors as they are"""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor, like):
    """A whole tensor -> as `like` is: on its device, and this process's shard if `like` is one"""
    tensor = tensor.to(like.device, copy=True)
    return distribute_tensor(tensor, like.device_mesh, like.placements) \
        if isinstance(like, DTensor) and tensor.shape == like.shape else tensor


def global_norm(tensors, sharded=False):
    """Euclidean norm of many tensors as one vector, () fp32; `sharded`: each process has its part of them, as it has of
    DTensors"""
    squares = []
    for tensor in tensors:                                                      # one at a time: they may be made so
        sharded = sharded or isinstance(tensor, DTensor)
        squares.append(local(tensor.detach()).float().square().sum())
    if not squares:
        return torch.tensor(0.0)
    square = torch.stack(squares).sum()
    return (all_sum(square) if sharded else square).sqrt()
