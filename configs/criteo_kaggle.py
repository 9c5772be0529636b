"""DLRM on the Criteo Kaggle log, as in facebookresearch/dlrm's Kaggle run.

python main.py --config configs/criteo_kaggle.py --config.data.train=train.txt
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
