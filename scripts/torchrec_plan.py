"""TorchRec's sharding plan for given tables, as JSON; needs torchrec.

  python scripts/torchrec_plan.py < problem.json

bench_plan.py calls it with a Python that has torch and torchrec, and costs the
plan by recjax's model. Reads {"tables": [{"name", "rows", "hotness"}], "dim",
"devices", "node_devices", "local_batch", "device_bytes", "host_bytes" (of a
device)}; writes a list of shards {"table" (index), "kind", "kernel", "device",
"rows", "columns"}. The planner is EmbeddingShardingPlanner with its defaults,
an Adagrad in the backward pass, on modules of the meta device.
"""

import json
import logging
import sys
import warnings

import torch
import torchrec
from torchrec.distributed import embeddingbag, planner
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import (
  apply_optimizer_in_backward,
)


def plan(problem: dict) -> list[dict]:
  """Plans what the file's docstring says is read and written."""
  tables = [
    torchrec.EmbeddingBagConfig(
      name=t["name"],
      embedding_dim=problem["dim"],
      num_embeddings=t["rows"],
      feature_names=[t["name"]],
    )
    for t in problem["tables"]
  ]
  bags = torchrec.EmbeddingBagCollection(
    device=torch.device("meta"), tables=tables
  )
  apply_optimizer_in_backward(
    torch.optim.Adagrad, bags.parameters(), {"lr": 0.01}
  )
  topology = planner.Topology(
    world_size=problem["devices"],
    compute_device="cuda",
    hbm_cap=problem["device_bytes"],
    ddr_cap=problem["host_bytes"],
    local_world_size=min(problem["node_devices"], problem["devices"]),
  )
  found = planner.EmbeddingShardingPlanner(
    topology=topology,
    batch_size=problem["local_batch"],
    constraints={
      t["name"]: ParameterConstraints(pooling_factors=[float(t["hotness"])])
      for t in problem["tables"]
    },
  ).plan(bags, [embeddingbag.EmbeddingBagCollectionSharder()])
  (of,) = found.plan.values()
  shards = []
  for i, table in enumerate(tables):
    p = of[table.name]
    if p.sharding_spec is None:  # replicated: data_parallel
      sizes = [(0, table.num_embeddings, table.embedding_dim)]
    else:
      sizes = [
        (s.placement.rank(), *s.shard_sizes) for s in p.sharding_spec.shards
      ]
    shards += [
      {
        "table": i,
        "kind": p.sharding_type,
        "kernel": p.compute_kernel,
        "device": device,
        "rows": rows,
        "columns": columns,
      }
      for device, rows, columns in sizes
    ]
  return shards


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  logging.disable(logging.WARNING)
  json.dump(plan(json.load(sys.stdin)), sys.stdout)
