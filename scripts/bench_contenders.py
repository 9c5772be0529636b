"""The contenders of bench_step.py: what each does in a training step.

A contender is (data, args) -> step; step(i) trains on batch i, waits for the
end of it, and returns the loss. `data` is what bench_step's `draw_batches`
gives: dense [n, B, 13], ids [n, B, S] int32 and labels [n, B] of n batches.
Tables of args.rows rows have args.hotness lookups a sample, S in all, whose
rows are summed. Frameworks are imported inside, since no Python has them all.
"""

import itertools

import numpy as np

DENSE = 13
BOTTOM, TOP = (512, 256, 64), (512, 256)  # hidden widths
LEARNING_RATE = 0.02
INIT_SCALE = 0.05


def by_table(x, args, axis=-1):  # S along the axis -> 26 parts of hotness
  return np.split(x, np.cumsum(args.hotness)[:-1], axis=axis)


def recjax_step(data, args):
  """As main.py trains: rows in frequency order, planned, one jitted step."""
  import jax
  from synthetic_step import (
    LARGE,
    Drawn,
    Run,
    Setting,
    plan_of,
    problems_of,
    rank_rows,
    tiers_of,
    topology_here,
  )

  from recjax.mesh import batch_sharding, make_mesh

  setting = Setting(
    tuple(args.rows),
    args.exponent,
    args.dim,
    args.batch,
    args.device_share,
    model=LARGE,
    hotness=tuple(args.hotness),
    small_dim=args.small_dim,
  )
  ranks = rank_rows(setting)
  topology = topology_here(args.topology)
  problems = problems_of(setting, ranks.profile, topology, 1)
  plan = plan_of(setting, problems, setting.share)
  print(
    f"{tiers_of(plan)}, predicted "
    f"{1e3 * plan.prediction.step_seconds:.1f} ms a step"
  )
  mesh = make_mesh(1)
  batches = [
    jax.device_put(
      {"dense": d, "ids": ranks.of(i), "label": y}, batch_sharding(mesh)
    )
    for d, i, y in zip(*data, strict=True)
  ]
  on_cpu = jax.devices()[0].platform == "cpu"
  on_host = args.route == "host" or (args.route == "auto" and on_cpu)
  run = Run(setting, plan, mesh, on_host).compile()
  run.start(Drawn(batches, ranks.profile))
  del batches, ranks

  def step(i):
    del i  # in the order of the others
    run.state, out = run.step(run.state, next(run.fed))
    return float(out["loss"])

  return step


def dlrm(args):
  """(params, (params, dense [b, 13], [[b, d] a table]) -> logits [b])."""
  from criteo_tables import names
  from synthetic_step import LARGE

  from recjax.models import build as models

  of = names(len(args.rows))
  params, apply = models.build(
    LARGE, DENSE, dict.fromkeys(of, (1, args.dim)), args.dim, 0
  )

  def of_vectors(params, dense, vectors):
    vectors = {k: x[:, None] for k, x in zip(of, vectors, strict=True)}
    return apply(params, dense, vectors, {})

  return params, of_vectors


def plain_jax_step(data, args):
  """What one writes first: tables are parameters like all others."""
  import jax
  import jax.numpy as jnp
  import optax

  params, apply = dlrm(args)
  keys = jax.random.split(jax.random.key(0), len(args.rows))
  tables = [
    jax.random.uniform(k, (r, args.dim), minval=-INIT_SCALE, maxval=INIT_SCALE)
    for k, r in zip(keys, args.rows, strict=True)
  ]
  slots = [jnp.zeros(r) for r in args.rows]
  optimizer = optax.adagrad(LEARNING_RATE, 0.0, 1e-8)

  def loss_of(params, tables, dense, ids, labels):
    rows = [
      jnp.take(t, i, axis=0).sum(axis=1)
      for t, i in zip(tables, by_table(ids, args), strict=True)
    ]
    logits = apply(params, dense, rows)
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

  vectors = len(args.rows) + 1
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
    for rows in args.rows
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
    [(rows, args.dim, *place) for rows in args.rows],
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
  "torch_sgd": (torch_sgd_step, ("torch",), 1.1),
  "torch_adagrad": (torch_adagrad_step, ("torch",), 2.1),
  "fbgemm": (fbgemm_step, ("torch", "fbgemm_gpu"), 1.2),
}
