"""The optimizer of the dense part, with its warm-up and decay."""

import optax

from recjax.config import Config


def dense_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
  """Makes the configured optimizer, with its warm-up and decay, for a run."""
  c = config.train
  rate = optax.constant_schedule(c.learning_rate)
  pieces, bounds = [rate], []
  if c.warmup_steps:
    warmup = optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)
    pieces.insert(0, warmup)
    bounds.append(c.warmup_steps)
  if c.decay_steps:
    pieces.append(optax.linear_schedule(c.learning_rate, 0.0, c.decay_steps))
    bounds.append(max(steps - c.decay_steps, c.warmup_steps))
  schedule = optax.join_schedules(pieces, bounds)
  make = {
    "sgd": optax.sgd,
    "adagrad": lambda rate: optax.adagrad(
      rate, initial_accumulator_value=0.0, eps=1e-8
    ),
    "adam": optax.adam,
  }
  return make[c.optimizer](schedule)
