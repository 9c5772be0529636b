"""Samples/s of a whole training step: recjax and what else there is.

  python scripts/bench_step.py --dim 16 --batch 8192 \
      --rivals_python PYTHON_WITH_TORCH_AND_FBGEMM

Every contender trains the same model (DLRM with criteo_kaggle's MLPs, dense
part by Adagrad) on the same batches, with the 26 Criteo Kaggle tables:

  recjax         row-wise Adagrad
  plain_jax      jnp.take, gradients through the tables, row-wise Adagrad
  torch_sgd      EmbeddingBag(sparse=True) a table, SGD
  torch_adagrad  the same, Adagrad (torch has no row-wise one)
  fbgemm         table-batched embeddings, fused exact row-wise Adagrad

Ids are drawn from a power law, the hottest first in every table. Contenders
run one after the other, each in a process of its own on the same cores and
with the same malloc settings, in rounds that start with another one each
time, so that noise hits all alike. Batches are converted to what a contender
wants before the clock starts. Those that are not installed or do not fit in
memory are left out with a note.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from recjax import topology  # needs nothing that torch's Python lacks

ROWS = (
  *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683),
  *(8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15),
  *(286181, 105, 142572),
)
DENSE = 13
BOTTOM, TOP = (512, 256, 64), (512, 256)  # hidden widths
LEARNING_RATE = 0.02
INIT_SCALE = 0.05


# Contenders: (data, args) -> step; step(i) trains on batch i, waits for the
# end of it, and returns the loss. data is what `draw_batches` gives.


def recjax_step(data, args):
  """As main.py trains: rows in frequency order, planned, one jitted step."""
  import jax
  import jax.numpy as jnp
  import optax

  from recjax import config, models, planner, sparse_optim, tables, train_step
  from recjax.frequency import Profile
  from recjax.mesh import batch_sharding, make_mesh, replicated
  from recjax.specs import Feature

  dense, ids, labels = data
  # The expected counts of a long log of that power law, in rank order.
  p = [np.arange(1, r + 1, dtype=np.float32) ** -args.exponent for r in ROWS]
  counts = np.concatenate([x / x.sum() for x in p]) * 1e9
  order = np.argsort(-counts, kind="stable")
  rank = np.empty(len(order), np.int32)
  rank[order] = np.arange(len(order), dtype=np.int32)
  names = tuple(f"C{i + 1}" for i in range(len(ROWS)))
  profile = Profile(
    10**9,
    names,
    counts[order].astype(np.int64),
    np.zeros(len(order), np.int16),
  )
  plan = planner.plan(
    profile,
    devices=1,
    hosts=1,
    batch_size=args.batch,
    lookups=len(ROWS),
    dim=args.dim,
    dtype="float32",
    slot_bytes=4,
    device_bytes=1 << 40,
    host_bytes=0,
  )
  params, apply = models.build(
    config.Model(bottom=BOTTOM, top=TOP), DENSE, len(ROWS), args.dim, seed=0
  )
  model = train_step.Model(
    apply=apply,
    features=tuple(Feature(name, name) for name in names),
    dense_optimizer=optax.adagrad(LEARNING_RATE, 0.0, 1e-8),
    sparse_optimizer=sparse_optim.rowwise_adagrad(LEARNING_RATE),
    plan=plan,
    exchange_dtype=jnp.float32,
    seed=0,
  )
  mesh = make_mesh(1)
  state = jax.device_put(
    (np.int32(0), params, model.dense_optimizer.init(params)),
    replicated(mesh),
  )
  rows = tables.init(plan, model.sparse_optimizer, mesh, INIT_SCALE, seed=0)
  state = train_step.TrainState(*state, rows)
  first = np.cumsum([0, *ROWS[:-1]])
  batches = [
    jax.device_put(
      {"dense": d, "ids": rank[first + i], "label": y}, batch_sharding(mesh)
    )
    for d, i, y in zip(dense, ids, labels, strict=True)
  ]
  update = train_step.make_train_step(model, mesh)

  def step(i):
    nonlocal state
    state, out = update(state, batches[i])
    return float(out["loss"])

  return step


def plain_jax_step(data, args):
  """What one writes first: tables are parameters like all others."""
  import jax
  import jax.numpy as jnp
  import optax

  from recjax import config, models

  model = config.Model(bottom=BOTTOM, top=TOP)
  params, apply = models.build(model, DENSE, len(ROWS), args.dim, seed=0)
  keys = jax.random.split(jax.random.key(0), len(ROWS))
  tables = [
    jax.random.uniform(k, (r, args.dim), minval=-INIT_SCALE, maxval=INIT_SCALE)
    for k, r in zip(keys, ROWS, strict=True)
  ]
  slots = [jnp.zeros(r) for r in ROWS]
  optimizer = optax.adagrad(LEARNING_RATE, 0.0, 1e-8)

  def loss_of(params, tables, dense, ids, labels):
    rows = [jnp.take(t, i, axis=0) for t, i in zip(tables, ids.T, strict=True)]
    logits = apply(params, dense, jnp.stack(rows, axis=1))
    losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    return losses.mean()

  def update(state, dense, ids, labels):
    params, opt, tables, slots = state
    loss, (g, table_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
      params, tables, dense, ids, labels
    )
    updates, opt = optimizer.update(g, opt)
    params = optax.apply_updates(params, updates)
    slots = [
      s + jnp.mean(g**2, axis=1)
      for s, g in zip(slots, table_grads, strict=True)
    ]
    tables = [
      t - LEARNING_RATE * g / (jnp.sqrt(s) + 1e-8)[:, None]
      for t, g, s in zip(tables, table_grads, slots, strict=True)
    ]
    return (params, opt, tables, slots), loss

  update = jax.jit(update, donate_argnums=0)
  state = params, optimizer.init(params), tables, slots
  batches = [tuple(map(jnp.asarray, b)) for b in zip(*data, strict=True)]

  def step(i):
    nonlocal state
    state, loss = update(state, *batches[i])
    return float(loss)

  return step


def torch_step(data, args, embed, ids_of, optimizers):
  """The torch contenders: `embed(ids)` gives the activations [B, 26 d]."""
  import torch

  def mlp(*widths):
    layers = [
      m
      for n_in, n_out in itertools.pairwise(widths)
      for m in (torch.nn.Linear(n_in, n_out), torch.nn.ReLU())
    ]
    return torch.nn.Sequential(*layers)

  vectors = len(ROWS) + 1
  i, j = torch.tril_indices(vectors, vectors, -1)
  pairs = i * vectors + j
  bottom = mlp(DENSE, *BOTTOM, args.dim)
  top = mlp(args.dim + len(pairs), *TOP)
  logit = torch.nn.Linear(TOP[-1], 1)
  layers = torch.nn.ModuleList([bottom, top, logit])
  for layer in layers.modules():  # as facebookresearch/dlrm
    if isinstance(layer, torch.nn.Linear):
      n_out, n_in = layer.weight.shape
      torch.nn.init.normal_(layer.weight, std=(2 / (n_in + n_out)) ** 0.5)
      torch.nn.init.normal_(layer.bias, std=n_out**-0.5)
  optimizers = [
    *optimizers,
    torch.optim.Adagrad(layers.parameters(), lr=LEARNING_RATE),
  ]
  loss_of = torch.nn.BCEWithLogitsLoss()
  batches = [
    (torch.from_numpy(dense), ids_of(ids), torch.from_numpy(labels))
    for dense, ids, labels in zip(*data, strict=True)
  ]

  def step(i):
    dense, ids, labels = batches[i]
    for optimizer in optimizers:
      optimizer.zero_grad(set_to_none=True)
    x = bottom(dense)
    z = torch.cat([x, embed(ids)], dim=1).view(-1, vectors, args.dim)
    products = torch.bmm(z, z.transpose(1, 2)).flatten(1)
    x = torch.cat([x, products.index_select(1, pairs)], dim=1)
    loss = loss_of(logit(top(x))[:, 0], labels)
    loss.backward()
    for optimizer in optimizers:
      optimizer.step()
    return loss.item()

  return step


def embedding_bag_step(data, args, optimizer):
  import torch

  torch.set_num_threads(args.cores)
  torch.manual_seed(0)
  tables = torch.nn.ModuleList(
    torch.nn.EmbeddingBag(
      rows,
      args.dim,
      mode="sum",
      sparse=True,
      include_last_offset=True,
      _weight=torch.empty(rows, args.dim).uniform_(-INIT_SCALE, INIT_SCALE),
    )
    for rows in ROWS
  )
  offsets = torch.arange(args.batch + 1)
  cls = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer]
  return torch_step(
    data,
    args,
    embed=lambda ids: torch.cat(
      [t(i, offsets) for t, i in zip(tables, ids, strict=True)], dim=1
    ),
    ids_of=lambda ids: list(torch.from_numpy(ids.T.astype(np.int64).copy())),
    optimizers=[cls(tables.parameters(), lr=LEARNING_RATE)],
  )


def torch_sgd_step(data, args):
  return embedding_bag_step(data, args, "sgd")


def torch_adagrad_step(data, args):
  return embedding_bag_step(data, args, "adagrad")


def fbgemm_step(data, args):
  import torch
  from fbgemm_gpu import split_table_batched_embeddings_ops_training as tbe
  from fbgemm_gpu.split_embedding_configs import EmbOptimType
  from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    EmbeddingLocation,
  )

  torch.set_num_threads(args.cores)
  torch.manual_seed(0)
  place = (EmbeddingLocation.HOST, tbe.ComputeDevice.CPU)
  tables = tbe.SplitTableBatchedEmbeddingBagsCodegen(
    [(rows, args.dim, *place) for rows in ROWS],
    optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    learning_rate=LEARNING_RATE,
    bounds_check_mode=BoundsCheckMode.NONE,
  )
  tables.init_embedding_weights_uniform(-INIT_SCALE, INIT_SCALE)
  offsets = torch.arange(len(ROWS) * args.batch + 1)
  return torch_step(
    data,
    args,
    embed=lambda ids: tables(ids, offsets),
    ids_of=lambda ids: torch.from_numpy(ids.T.astype(np.int64).reshape(-1)),
    optimizers=[],  # fused into the backward pass
  )


# Name -> (step, packages, copies of the tables that it holds at its peak).
CONTENDERS = {
  "recjax": (recjax_step, ("jax",), 1.2),
  "plain_jax": (plain_jax_step, ("jax",), 2.3),
  "torch_sgd": (torch_sgd_step, ("torch",), 1.1),
  "torch_adagrad": (torch_adagrad_step, ("torch",), 2.1),
  "fbgemm": (fbgemm_step, ("torch", "fbgemm_gpu"), 1.2),
}


def draw_batches(args):
  """Dense [n, B, 13], ids [n, B, 26] int32 and labels [n, B] of n batches."""
  rng = np.random.default_rng(args.seed)
  shape = (args.batches, args.batch)
  ids = np.stack([power_law(rng, shape, r, args.exponent) for r in ROWS], -1)
  dense = rng.random((*shape, DENSE), np.float32)
  labels = (rng.random(shape) < 0.25).astype(np.float32)
  return dense, ids, labels


def power_law(rng, shape, rows, exponent):
  """Ids below `rows`, P(id) falling as (id + 1)^-exponent."""
  u = rng.random(shape)
  e = 1 - exponent
  if abs(e) < 1e-9:
    x = (rows + 1.0) ** u
  else:
    x = (1 + u * ((rows + 1.0) ** e - 1)) ** (1 / e)
  return np.minimum(x.astype(np.int64) - 1, rows - 1).astype(np.int32)


def work(args):
  """In the contender's own process: prints step times as one JSON line."""
  make_step, packages, copies = CONTENDERS[args.worker]
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
  if args.malloc == "tuned":
    topology.keep_freed_memory()
  missing = [p for p in packages if importlib.util.find_spec(p) is None]
  if missing:
    return {"skipped": f"{' and '.join(missing)} not installed"}
  need = copies * sum(ROWS) * args.dim * 4
  have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if need > have:
    return {"skipped": f"needs {need / 1e9:.0f} GB, {have / 1e9:.0f} GB free"}
  data = [np.load(Path(args.folder) / f"{i}.npy") for i in range(3)]
  step = make_step(data, args)
  seconds, losses = [], []
  for i in range(args.warmup + args.steps):
    start = time.perf_counter()
    losses.append(step(i % args.batches))
    seconds.append(time.perf_counter() - start)
  names = {"fbgemm_gpu": ("fbgemm-gpu-cpu", "fbgemm-gpu")}
  return {
    "seconds": seconds[args.warmup :],
    "loss": losses[-1],
    "versions": {p: version(*names.get(p, (p,))) for p in packages},
  }


def version(*names):
  for name in names:
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return "?"


def run_worker(name, args, folder):
  rival = "torch" in CONTENDERS[name][1]
  command = [args.rivals_python if rival else sys.executable, __file__]
  for field in ("dim", "batch", "batches", "warmup", "steps", "cores"):
    command += [f"--{field}", str(getattr(args, field))]
  command += ["--malloc", args.malloc, "--worker", name, "--folder", folder]
  try:
    out = subprocess.run(command, capture_output=True, text=True)
  except OSError as e:
    return {"skipped": str(e)}
  if out.returncode:
    last = (out.stderr.strip().splitlines() or ["no message"])[-1]
    return {"skipped": f"exit code {out.returncode}: {last}"}
  return json.loads(out.stdout.splitlines()[-1])


def compare(args):
  results = {name: {"seconds": []} for name in args.contenders}
  with tempfile.TemporaryDirectory() as folder:
    for i, array in enumerate(draw_batches(args)):
      np.save(Path(folder) / f"{i}.npy", array)
    for r in range(args.rounds):
      start = r % len(args.contenders)
      for name in args.contenders[start:] + args.contenders[:start]:
        if "skipped" in results[name]:
          continue
        result = run_worker(name, args, folder)
        result["seconds"] = [
          *results[name]["seconds"],
          *result.get("seconds", []),
        ]
        results[name] = result
  for result in results.values():
    if "skipped" not in result:
      seconds = np.array(result["seconds"])
      result["samples_per_second"] = args.batch / float(np.median(seconds))
      result["best"] = args.batch / float(seconds.min())
  return results


def machine():
  cpu = platform.processor() or platform.machine()
  info = Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        cpu = line.split(":")[1].strip()
        break
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "cpu": cpu,
    "cores_of_machine": os.cpu_count(),
    "load": os.getloadavg()[0],
    "python": platform.python_version(),
  }


def report(settings, results):
  fbgemm = results.get("fbgemm", {}).get("samples_per_second")
  print(
    f"\ndim {settings['dim']}, batch {settings['batch']}, power law "
    f"{settings['exponent']}, {settings['cores']} cores, "
    f"{settings['rounds']} x {settings['steps']} steps, "
    f"malloc {settings['malloc']}"
  )
  print("contender      samples/s     best  / fbgemm  ms/step  loss")
  for name, r in results.items():
    if "skipped" in r:
      print(f"{name:13} skipped: {r['skipped']}")
      continue
    ratio = f"{r['samples_per_second'] / fbgemm:.2f}" if fbgemm else "-"
    ms = 1e3 * settings["batch"] / r["samples_per_second"]
    versions = " ".join(f"{k} {v}" for k, v in r["versions"].items())
    print(
      f"{name:13} {r['samples_per_second']:10,.0f} {r['best']:8,.0f} "
      f"{ratio:>9} {ms:8.1f}  {r['loss']:.4f}  {versions}",
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--dim", type=int, nargs="+", default=[16, 64])
  add("--batch", type=int, nargs="+", default=[2048, 8192])
  add("--exponent", type=float, default=1.05, help="of the ids' power law")
  add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
  add("--rivals_python", default=sys.executable, help="has torch and fbgemm")
  add("--rounds", type=int, default=3)
  add("--steps", type=int, default=20, help="timed, a round")
  add("--warmup", type=int, default=5, help="steps before, a round")
  add("--batches", type=int, default=16, help="different ones, cycled")
  add("--cores", type=int, default=2)
  add("--malloc", choices=["tuned", "default"], default="tuned")
  add("--seed", type=int, default=0)
  add("--json", help="file to write")
  add("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
  add("--folder", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    args.dim, args.batch = args.dim[0], args.batch[0]
    print(json.dumps(work(args)))
    return
  about = machine()
  print(", ".join(f"{k} {v}" for k, v in about.items()))
  runs = []
  for dim, batch in itertools.product(args.dim, args.batch):
    one = argparse.Namespace(**{**vars(args), "dim": dim, "batch": batch})
    results = compare(one)
    names = ("dim", "batch", "exponent", "cores", "rounds", "steps", "malloc")
    settings = {k: getattr(one, k) for k in names}
    report(settings, results)
    runs.append({**settings, "results": results})
  if args.json:
    Path(args.json).write_text(json.dumps({**about, "runs": runs}, indent=1))


if __name__ == "__main__":
  main()
