"""What the ranks do; each leaves in FOLDER what it saw of each scenario.

Run as `python -m tests.distributed.job FOLDER WORLD:SCENARIO,SCENARIO,… …`. The ranks are forked from one process, so
that the libraries are imported once.
"""

import collections
import ctypes
import itertools
import os
import pickle
import signal
import sys
import threading
import time
import types
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ww_monitor
from tests.distributed import models
from ww_monitor.distributed import FrozenRows, analyze_on_ranks
from ww_monitor.distributed.ranks import Ranks
from ww_monitor.distributed.shards import Shipment
from ww_monitor.engine import Options
from ww_monitor.errors import WWMonitorError
from ww_monitor.matrix import Matrix
from ww_monitor.metric import measurement
from ww_monitor.metric.table import metric
from ww_monitor.walk.sharded import even_shards
from ww_monitor.walk.torch import walk

PLAN = {"embedding": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
OPTIONS = Options(keep_eigenvalues=True)


def analyze(model, **options):
    return ww_monitor.analyze(model, min_size=3, across_ranks=True, **options)


# --- models as trainers hold them


def ddp(rank, world):
    return analyze(DistributedDataParallel(models.net()))


def fsdp2(rank, world):
    model = models.net()
    fully_shard(model.experts)
    fully_shard(model)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    generator, flags = torch.get_rng_state(), [parameter.requires_grad for parameter in model.parameters()]
    threads, default = torch.get_num_threads(), dist.group.WORLD
    snapshot = analyze(model)
    after = [parameter.to_local() for parameter in model.parameters()]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert (threads, default) == (torch.get_num_threads(), dist.group.WORLD)
    return snapshot


def fsdp2_measured(rank, world):
    """A measurement that the package does not know, and does not declare that a Gram matrix suffices."""

    @measurement()
    def corners(loaded, known, definitions):
        return {"corner": torch.stack([layer[0, 0, 0].double() for layer in loaded.layers])}

    def corner(batch):
        """The first weight."""
        return batch.column("corner")

    metric(source="this test", needs="corners", standard=False)(corner)
    model = models.chain()
    fully_shard(model)
    return analyze(model, metrics=["alpha", "corner"])


def fsdp2_weightwatcher(rank, world):
    model = models.chain()
    fully_shard(model)
    return analyze(model, preset="weightwatcher")


def fsdp2_delta(rank, world):
    model, base = models.chain(), models.chain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(parameter.cos())
    fully_shard(model)
    fully_shard(base)
    return analyze(model, base=base)


def fsdp2_state(rank, world):
    """A state dict in shards with the factors of an adapter, where new tensors have no numbers; and the same whole."""
    model, mesh = models.chain(), init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    factors = {"up.lora_A.weight": torch.arange(160.0).sin().view(5, 32), "up.lora_B.weight": torch.ones(72, 5).tril()}
    state = model.state_dict() | {
        name: distribute_tensor(factor, mesh, [Shard(0)], src_data_rank=None) for name, factor in factors.items()
    }
    whole = {name: tensor.full_tensor() for name, tensor in state.items()}
    torch.set_default_device("meta")
    try:
        return analyze(state), ww_monitor.analyze(whole, min_size=3)
    finally:
        torch.set_default_device(None)


def fsdp2_bfloat16(rank, world):
    model = models.net().bfloat16()
    fully_shard(model)
    return analyze(model)


def tensor_parallel(rank, world):
    return analyze(parallelize_module(models.chain(), init_device_mesh("cpu", (world,)), PLAN))


def mixed(rank, world):
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(models.chain(), mesh["tensor"], PLAN)
    fully_shard(model, mesh=mesh["data"])
    return analyze(model)


def hsdp(rank, world):
    model = models.net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    return analyze(model)


def data_and_tensor(rank, world):
    """Tensor parallel, and replicas of that which no mesh knows of."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    return analyze(parallelize_module(models.chain(), mesh["tensor"], PLAN))


def fsdp1(rank, world, original=True):
    model = models.net()
    model.experts = FullyShardedDataParallel(model.experts, device_id=torch.device("cpu"), use_orig_params=original)
    for module in model.frozen, model.zero, model.broken:
        module.requires_grad_(True)
    return analyze(FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original))


def fsdp1_flat(rank, world):
    return fsdp1(rank, world, original=False)


class Partition:
    """DeepSpeed's documented protocol: a parameter without data, its shape in `ds_shape`, gathered in a context."""

    def __init__(self, model):
        self.whole = {}
        for parameter in model.parameters():
            parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape
            self.whole[parameter.ds_id] = parameter.detach().clone()
            parameter.data = torch.empty(0)

    def gathered(self, parameters, modifier_rank=0):
        assert modifier_rank is None
        return _Gathered(self, list(parameters))


class _Gathered:
    def __init__(self, partition, parameters):
        self.partition, self.parameters = partition, parameters

    def __enter__(self):
        for parameter in self.parameters:
            dist.barrier()  # a collective, as the real one is
            parameter.data = self.partition.whole[parameter.ds_id]

    def __exit__(self, *error):
        for parameter in self.parameters:
            parameter.data = torch.empty(0)


def zero3(rank, world):
    model = models.chain()
    zero = types.SimpleNamespace(GatheredParameters=Partition(model).gathered)
    sys.modules["deepspeed"] = types.SimpleNamespace(zero=zero)
    try:
        return analyze(model)
    finally:
        del sys.modules["deepspeed"]


def alone(rank, world):
    """The call of one process, made on shards."""
    model = models.chain()
    fully_shard(model)
    return ww_monitor.analyze(model)


def training(rank, world):
    """Whether a step, an analysis and a step end in the same bits as two steps, on this rank."""
    return [torch.equal(a, b) for a, b in zip(trained(watched=False), trained(watched=True), strict=True)]


def trained(watched):
    model = models.chain()
    for module in model.children():
        fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        torch.manual_seed(4)
        nn.functional.dropout(model(torch.randint(64, (8,))), 0.1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if watched:
            analyze(model)
    return [parameter.to_local().detach() for parameter in model.parameters()]


# --- ranks that differ


def experts(rank, world):
    """The same names on every rank: a router that all hold, and an expert of its own on each."""
    torch.manual_seed(0)
    router = nn.Linear(30, 40)
    torch.manual_seed(10 + rank)
    return analyze(nn.ModuleDict({"router": router, "expert": nn.Linear(30, 40)}))


def pipeline(rank, world):
    """Each rank a stage of its own; the last has no matrix."""
    if rank == world - 1:
        return analyze(nn.LayerNorm(8))
    torch.manual_seed(rank)
    return analyze(nn.ModuleDict({f"stage{rank}": nn.Linear(40, 30), "also" + str(rank): nn.Linear(20, 20)}))


def broken_layer(rank, world):
    """A piece that cannot be read on rank 1, and a replica that cannot be read there, or nowhere."""
    model = models.chain()
    fully_shard(model)
    items = list(walk(model))
    plain = [Matrix(name, "dense", (1, 30, 20), reading(rank, name)) for name in ("there", "nowhere")]
    for i, item in enumerate(items):
        if item.name == "up" and rank == 1:
            piece = replace(item.shards.piece, load=failing)
            items[i] = replace(item, shards=replace(item.shards, piece=piece))
    return analyze_on_ranks(items + plain, OPTIONS)


def late_break(rank, world):
    """Pieces that can be read once, and then not any more: cut along the long side and along the short one."""
    model = models.chain()
    fully_shard(model)
    items = list(walk(model))
    for i, item in enumerate(items):
        if item.name in ("up", "down") and rank == 1:
            loads = iter([item.shards.piece.load])
            piece = replace(item.shards.piece, load=lambda loads=loads: next(loads, failing)())
            items[i] = replace(item, shards=replace(item.shards, piece=piece))
    return analyze_on_ranks(items, OPTIONS)


def reading(rank, name):
    weights = torch.randn(1, 30, 20, generator=torch.Generator().manual_seed(5))
    return failing if rank == 1 or name == "nowhere" else lambda: weights


def failing():
    raise ValueError("cannot be read")


def strict(rank, world):
    model = models.net()
    fully_shard(model)
    return analyze(model, strict=True)


def bad_walker(rank, world):
    def items():
        yield Matrix("fc", "dense", (1, 30, 20), lambda: torch.ones(1, 30, 20))
        if rank == 1:
            raise KeyError("of rank 1")

    return analyze_on_ranks(items(), OPTIONS)


def twice(rank, world):
    """Two calls use one group; the steps are those of the calls."""
    model = models.chain()
    first = analyze_on_ranks(walk(model), OPTIONS, step=3, epoch=1)
    groups = len(dist.distributed_c10d._world.pg_map)
    second = analyze_on_ranks(walk(model), OPTIONS, step=4)
    assert len(dist.distributed_c10d._world.pg_map) == groups
    return first, second


def subgroup(rank, world):
    """Two groups of ranks, each with a model of its own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(rank % 2)
    return analyze_on_ranks(walk(nn.Linear(30 + rank % 2, 40)), OPTIONS, group=groups[rank % 2])


def subgroup_shards(rank, world):
    """Two groups of ranks, each with a model of its own in shards."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("models", "shards"))
    torch.manual_seed(mesh.get_local_rank("models"))
    model = nn.Linear(30, 41)
    fully_shard(model, mesh=mesh["shards"])
    return analyze_on_ranks(walk(model), OPTIONS, group=mesh["shards"].get_group())


def killed_while_adding(rank, world):
    """The rank that shards come to is killed while it adds them up."""
    model = models.chain()
    fully_shard(model)
    if rank == 1:
        add = Shipment.add
        Shipment.add = lambda self, source, *block: add(self, source, *block) if source == 1 else die()
    return failure(list(walk(model)), timeout=20.0)


# --- what is sent


class Counting(TorchDispatchMode):
    """Bytes that this rank sends in every collective of torch.distributed, by the name of the operation.

    What reaches several ranks is counted for each of them.
    """

    def __init__(self):
        super().__init__()
        self.sent = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        home, _, name = function._schema.name.partition("::")
        if home in ("c10d", "_c10d_functional") and name != "recv_":
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            others = 1 if name == "send" else dist.get_world_size() - 1
            self.sent[name] += others * sum(one.nbytes for one in tensors)
        return function(*args, **(kwargs or {}))


def counted(rank, world, model=None, **options):
    """A look at matrices of several blocks each: the bytes by operation, and the snapshot."""
    model = models.large() if model is None else model
    fully_shard(model)
    with Counting() as counting:
        snapshot = analyze(model, **options)
    return counting.sent, snapshot


def counted_whole(rank, world):
    """All that is asked of the weights themselves: every matrix arrives whole."""
    return counted(rank, world, preset="weightwatcher")


def counted_replicas(rank, world):
    model = models.large()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    with Counting() as counting:
        snapshot = analyze(model)
    return counting.sent, snapshot


def counted_mixed(rank, world):
    """Matrices cut along both sides."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(models.large(), mesh["tensor"], {"tall": RowwiseParallel(), "wide": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    with Counting() as counting:
        snapshot = analyze(model)
    return counting.sent, snapshot


def shares(rank, world):
    """The parts that FSDP2 gives this rank, and those that a plan would say."""
    model = models.net()
    planned = {item.name: item for item in walk(model, layout=even_shards) if isinstance(item, Matrix)}
    fully_shard(model)
    found = {item.name: item for item in walk(model) if isinstance(item, Matrix)}
    here = {name: item.shards.piece.index for name, item in found.items()}
    return {
        name: (index, planned[name].shards.parts(planned[name].shape, world).get(rank)) for name, index in here.items()
    }


def frozen(rank, world):
    """Four looks: the first, one after training, one after a frozen shard has changed on one rank, one more."""
    model, frozen = models.large(), FrozenRows()
    model.tall.requires_grad_(False)
    model.wide.requires_grad_(False)
    fully_shard(model)
    steps, sent = [], []
    for step in range(4):
        with torch.no_grad():
            model.experts.down_proj.mul_(1.01)
            if step == 2 and rank == 1:
                model.tall.weight.to_local()[0, 0] += 1.0
        with Counting() as counting:
            snapshot = analyze_on_ranks(walk(model), OPTIONS, step=step, frozen=frozen)
        steps.append({layer.name: layer.step for layer in snapshot.layers})
        sent.append(counting.sent["send"])
    return steps, sent, snapshot


# --- memory


def memory(rank, world, tall=True):
    """Bytes beyond the model at the peak of an analysis, sampled by a thread."""
    ctypes.CDLL(None).mallopt(-3, 1 << 18)  # large blocks go back at once: resident memory is what is held
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*((1000, 24000) if tall else (24000, 1000)), bias=False) for _ in range(3)))
    fully_shard(model)
    warm = nn.Sequential(nn.Linear(300, 400, bias=False), nn.Linear(400, 300, bias=False))
    fully_shard(warm)
    analyze(warm)  # whatever is loaded late
    before = peak = resident()
    over = threading.Event()

    def sample():
        nonlocal peak
        while not over.wait(0.0005):
            peak = max(peak, resident())

    thread = threading.Thread(target=sample)
    thread.start()
    analyze(model)
    over.set()
    thread.join()
    return peak - before


def memory_wide(rank, world):
    return memory(rank, world, tall=False)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- ranks that are missing


def killed(rank, world):
    """Rank 1 is killed while it analyses; the others say so, and say it again at once."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    load = die if rank == 1 else lambda: torch.ones(1, 30, 20)
    loads = iter([lambda: torch.full((1, 30, 20), 1.0 + rank)])
    items = [Matrix("expert", "dense", (1, 30, 20), lambda: next(loads, load)())]
    return failure(items, timeout=20.0)


def killed_in_shards(rank, world):
    """Rank 1 is killed where the others wait for its shard."""
    model = models.chain()
    fully_shard(model)
    items = list(walk(model))
    for i, item in enumerate(items):
        if item.name == "down" and rank == 1:
            loads = iter([item.shards.piece.load])
            piece = replace(item.shards.piece, load=lambda loads=loads: next(loads, die)())
            items[i] = replace(item, shards=replace(item.shards, piece=piece))
    return failure(items, timeout=20.0)


def killed_on_the_way(rank, world, victim, moment):
    """A rank is killed between two shards: it waits, as the others do."""
    model = models.net()
    fully_shard(model)
    swap, calls = Ranks.swap, itertools.count(1)
    if rank == victim:
        Ranks.swap = lambda *given: die() if next(calls) == moment else swap(*given)
    return failure(list(walk(model)), timeout=20.0)


killed_on_the_way_1_2 = partial(killed_on_the_way, victim=1, moment=2)
killed_on_the_way_2_5 = partial(killed_on_the_way, victim=2, moment=5)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(rank, world):
    """Rank 1 never comes back from a layer, until the others have given up."""
    loads = iter([lambda: torch.full((1, 30, 20), 1.0 + rank)])

    def load():
        if rank == 1:
            time.sleep(5)
        return torch.ones(1, 30, 20)

    return failure([Matrix("expert", "dense", (1, 30, 20), lambda: next(loads, load)())], timeout=2.0)


def failure(items, timeout):
    start = time.perf_counter()
    try:
        analyze_on_ranks(items, OPTIONS, timeout=timeout)
    except WWMonitorError as error:
        first = type(error).__name__, str(error), time.perf_counter() - start
    else:
        return "no failure"
    start = time.perf_counter()
    try:
        analyze_on_ranks(items, OPTIONS, timeout=timeout)
    except WWMonitorError as error:
        return *first, str(error), time.perf_counter() - start


def killed_keeper(rank, world):
    return killed_on_the_way(rank, world, victim=0, moment=2)


def kept_by_first(path, rank):
    """A store that goes with the first rank, as that of a job without a launcher."""
    if rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        path.with_suffix(".new").write_text(str(store.port))
        path.with_suffix(".new").rename(path)
        return store
    while not path.exists():
        time.sleep(0.01)
    return dist.TCPStore("localhost", int(path.read_text()), is_master=False)


# --- the job


def main(rank, world, folder, scenarios):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = folder / f"store-{world}-{scenarios[0]}"
    store = kept_by_first(path, rank) if scenarios == ["killed_keeper"] else dist.FileStore(str(path), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=40))
    for scenario in scenarios:
        try:
            seen = globals()[scenario](rank, world)
        except Exception as error:  # noqa: BLE001 - for the test to look at
            seen = error
        (folder / f"{scenario}-{world}-{rank}.pkl").write_bytes(pickle.dumps(seen))
    os._exit(0)  # without waiting for ranks that are gone


if __name__ == "__main__":
    for job in sys.argv[2:]:
        world, _, scenarios = job.partition(":")
        children = []
        for rank in range(int(world)):
            child = os.fork()
            if child == 0:
                main(rank, int(world), Path(sys.argv[1]), scenarios.split(","))
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
