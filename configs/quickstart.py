"""A whole run without a download: DLRM on logs drawn from a planted teacher.

  python main.py --config configs/quickstart.py
"""

from recjax.config import Config


def get_config() -> Config:
  c = Config()
  c.data.format = "synthetic"
  c.data.min_count = 2
  c.embedding.dim = 16
  c.embedding.optimizer = "adagrad"
  c.embedding.learning_rate = 0.05
  c.model.bottom = (64, 32)
  c.model.top = (64, 32)
  c.mesh.devices = 8
  c.plan.device_memory_mb = 2
  c.train.batch_size = 4_096
  c.train.optimizer = "adagrad"
  c.train.learning_rate = 0.02
  c.train.log_every_steps = 20
  return c
