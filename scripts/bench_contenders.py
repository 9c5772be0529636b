"""The contenders of bench_step.py: what each does in a training step.

A contender is (data, args) -> step; step(i) trains on batch i, waits for the
end of it, and returns the loss. `data` is what bench_step's `draw_batches`
gives: dense [n, B, 13], ids [n, B, S] int32 and labels [n, B] of n batches.
Each of the 26 tables has args.hotness lookups a sample, S in all, whose rows
are summed. Frameworks are imported inside, since no Python has all of them.
"""

import itertools

import numpy as np

ROWS = (
  *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683),
  *(8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15),
  *(286181, 105, 142572),
)
# Of a sample, by table; as MLPerf training's DLRM-DCNv2.
MULTI_HOT = (
  *(3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10),
  *(3, 1, 1),
)
DENSE = 13
BOTTOM, TOP = (512, 256, 64), (512, 256)  # hidden widths
LEARNING_RATE = 0.02
INIT_SCALE = 0.05


def by_table(x, args, axis=-1):  # S along the axis -> 26 parts of hotness
  return np.split(x, np.cumsum(args.hotness)[:-1], axis=axis)


def recjax_step(data, args):
  """As main.py trains: rows in frequency order, planned, one jitted step."""
  import jax
  import jax.numpy as jnp
  import optax

  from recjax import config
  from recjax.embedding import optimizers, tables
  from recjax.frequency import Profile
  from recjax.mesh import batch_sharding, make_mesh, replicated
  from recjax.models import dlrm
  from recjax.planner import frequency_buckets, presets, step_cost
  from recjax.planner import solve as solve_lib
  from recjax.schema import Feature
  from recjax.training import step as step_lib

  dense, ids, labels = data
  # The expected counts of a long log of that power law, in rank order.
  p = [np.arange(1, r + 1, dtype=np.float32) ** -args.exponent for r in ROWS]
  counts = [x * (h / x.sum()) for x, h in zip(p, args.hotness, strict=True)]
  counts = np.concatenate(counts) * 1e9
  order = np.argsort(-counts, kind="stable")
  rank = np.empty(len(order), np.int32)
  rank[order] = np.arange(len(order), dtype=np.int32)
  names = tuple(f"C{i + 1}" for i in range(len(ROWS)))
  profile = Profile(
    10**9,
    names,
    counts[order].astype(np.int64),
    np.repeat(np.arange(len(ROWS), dtype=np.int16), ROWS)[order],
  )
  if args.topology:
    topology = presets.get(args.topology, 1)
  else:
    topology = presets.of_device(jax.devices()[0].device_kind, 1, 1)
  plan = solve_lib.plan(
    frequency_buckets.of_profile(profile, args.hotness),
    topology=topology,
    devices=1,
    hosts=1,
    batch_size=args.batch,
    lookups=sum(args.hotness),
    dim=args.dim,
    dense=step_cost.dense_model(
      "dlrm", BOTTOM, TOP, DENSE, len(ROWS), args.dim
    ),
    dtype="float32",
    slot_bytes=4,
    device_bytes=int(args.device_share * sum(ROWS)) * (4 * args.dim + 4),
    host_bytes=1 << 40,
  )
  print(
    f"{plan.hot:,} hot, {plan.warm:,} warm, {plan.cold:,} cold rows, predicted "
    f"{1e3 * plan.step_seconds:.1f} ms a step"
  )
  params, apply = dlrm.build(
    config.Model(bottom=BOTTOM, top=TOP), DENSE, len(ROWS), args.dim, seed=0
  )
  model = step_lib.Model(
    apply=apply,
    features=tuple(map(Feature, names, names, args.hotness)),
    dense_optimizer=optax.adagrad(LEARNING_RATE, 0.0, 1e-8),
    sparse_optimizer=optimizers.rowwise_adagrad(LEARNING_RATE),
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
  state = step_lib.TrainState(*state, rows)
  first = np.repeat(np.cumsum([0, *ROWS[:-1]]), args.hotness)
  batches = [
    jax.device_put(
      {"dense": d, "ids": rank[first + i], "label": y}, batch_sharding(mesh)
    )
    for d, i, y in zip(dense, ids, labels, strict=True)
  ]
  update = step_lib.make_train_step(model, mesh)

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

  from recjax import config
  from recjax.models import dlrm

  model = config.Model(bottom=BOTTOM, top=TOP)
  params, apply = dlrm.build(model, DENSE, len(ROWS), args.dim, seed=0)
  keys = jax.random.split(jax.random.key(0), len(ROWS))
  tables = [
    jax.random.uniform(k, (r, args.dim), minval=-INIT_SCALE, maxval=INIT_SCALE)
    for k, r in zip(keys, ROWS, strict=True)
  ]
  slots = [jnp.zeros(r) for r in ROWS]
  optimizer = optax.adagrad(LEARNING_RATE, 0.0, 1e-8)

  def loss_of(params, tables, dense, ids, labels):
    rows = [
      jnp.take(t, i, axis=0).sum(axis=1)
      for t, i in zip(tables, by_table(ids, args), strict=True)
    ]
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


def host_jax_step(data, args):
  """Tables on the host, not cached or coalesced: each lookup sends its row."""
  import jax
  import jax.numpy as jnp
  import optax
  from jax import lax

  from recjax import config
  from recjax.embedding.tables import DEVICE, HOST, gather, on_host
  from recjax.mesh import make_mesh, replicated
  from recjax.models import dlrm

  model = config.Model(bottom=BOTTOM, top=TOP)
  params, apply = dlrm.build(model, DENSE, len(ROWS), args.dim, seed=0)
  optimizer = optax.adagrad(LEARNING_RATE, 0.0, 1e-8)
  place = replicated(make_mesh(1))
  rng = np.random.default_rng(0)
  rows = rng.random((sum(ROWS), 1, args.dim), np.float32)
  rows -= 0.5
  rows *= 2 * INIT_SCALE
  on_the_host = place.with_memory_kind("pinned_host")
  rows = jax.device_put(rows, on_the_host)

  def add(table, index, rows):
    dims = lax.ScatterDimensionNumbers(
      update_window_dims=(1,),
      inserted_window_dims=(0, 1),
      scatter_dims_to_operand_dims=(0, 1),
    )
    return lax.scatter_add(table, index, rows, dims)

  def loss_of(params, rows, dense, labels):
    bags = [x.sum(axis=1) for x in by_table(rows, args, axis=1)]
    logits = apply(params, dense, jnp.stack(bags, axis=1))
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

  def update(state, dense, ids, labels):
    params, opt, table = state
    index = jnp.stack([ids.reshape(-1), jnp.zeros(ids.size, jnp.int32)], axis=1)
    index = jax.device_put(index, HOST)
    rows = on_host(gather, DEVICE)(table, index)
    loss, (g, row_grads) = jax.value_and_grad(loss_of, argnums=(0, 1))(
      params, rows.reshape(*ids.shape, -1), dense, labels
    )
    updates, opt = optimizer.update(g, opt)
    change = -LEARNING_RATE * row_grads.reshape(-1, args.dim)
    table = on_host(add)(table, index, jax.device_put(change, HOST))
    return (optax.apply_updates(params, updates), opt, table), loss

  update = jax.jit(
    update,
    donate_argnums=0,
    out_shardings=((place, place, on_the_host), place),
  )
  state = *jax.device_put((params, optimizer.init(params)), place), rows
  first = np.repeat(np.cumsum([0, *ROWS[:-1]]), args.hotness).astype(np.int32)
  batches = [
    jax.device_put((dense, first + ids, labels), place)
    for dense, ids, labels in zip(*data, strict=True)
  ]

  def step(i):
    nonlocal state
    state, loss = update(state, *batches[i])
    return float(loss)

  return step


def torch_step(data, args, embed, ids_of, optimizers):
  """The torch contenders: `embed(ids)` gives the activations [B, 26 d].

  The tables are on the CPU, the dense part on the GPU where torch sees one.
  """
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
  device = "cuda" if torch.cuda.is_available() else "cpu"
  pairs = pairs.to(device)
  layers = torch.nn.ModuleList([bottom, top, logit]).to(device)
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
    (
      torch.from_numpy(dense).to(device),
      ids_of(ids),
      torch.from_numpy(labels).to(device),
    )
    for dense, ids, labels in zip(*data, strict=True)
  ]

  def step(i):
    dense, ids, labels = batches[i]
    for optimizer in optimizers:
      optimizer.zero_grad(set_to_none=True)
    x = bottom(dense)
    z = torch.cat([x, embed(ids).to(device)], dim=1).view(-1, vectors, args.dim)
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
  offsets = [torch.arange(args.batch + 1) * h for h in args.hotness]
  cls = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer]
  return torch_step(
    data,
    args,
    embed=lambda ids: torch.cat(
      [t(i, o) for t, i, o in zip(tables, ids, offsets, strict=True)], dim=1
    ),
    ids_of=lambda ids: [
      torch.from_numpy(x.reshape(-1).astype(np.int64))
      for x in by_table(ids, args)
    ],
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
  lengths = torch.tensor(args.hotness).repeat_interleave(args.batch)
  offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
  return torch_step(
    data,
    args,
    embed=lambda ids: tables(ids, offsets),
    ids_of=lambda ids: torch.from_numpy(
      np.concatenate([x.reshape(-1) for x in by_table(ids, args)]).astype(
        np.int64
      )
    ),
    optimizers=[],  # fused into the backward pass
  )


# Name -> (step, packages, copies of the tables that it holds at its peak).
CONTENDERS = {
  "recjax": (recjax_step, ("jax",), 1.2),
  "plain_jax": (plain_jax_step, ("jax",), 2.3),
  "host_jax": (host_jax_step, ("jax",), 2.1),
  "torch_sgd": (torch_sgd_step, ("torch",), 1.1),
  "torch_adagrad": (torch_adagrad_step, ("torch",), 2.1),
  "fbgemm": (fbgemm_step, ("torch", "fbgemm_gpu"), 1.2),
}
