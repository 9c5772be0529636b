"""DLRM on the Criteo Kaggle log, as in facebookresearch/dlrm's Kaggle run.

  python main.py --config configs/criteo_kaggle.py --config.data.train=train.txt

dim 16, bottom 512-256-64-16, top 512-256-1, one epoch, batch 128. On the first
80,000 lines (--config.data.test_fraction=0.2) it takes 20 s on one CPU device
and gives a test AUC of 0.771 (mean of three seeds). The whole log has 45.8 M
lines: at some 20,000 samples/s and batch 128 that is an hour on two cores.
"""

from recjax.config import Config


def get_config() -> Config:
  c = Config()
  c.data.format = "criteo"
  c.data.min_count = 2
  c.embedding.dim = 16
  c.embedding.optimizer = "rowwise_adagrad"
  c.embedding.learning_rate = 0.02
  c.model.name = "dlrm"
  c.model.bottom = (512, 256, 64)
  c.model.top = (512, 256)
  c.train.batch_size = 128
  c.train.optimizer = "adagrad"
  c.train.learning_rate = 0.02
  c.train.decay_steps = 250  # without it the last steps' noise costs log loss
  return c
