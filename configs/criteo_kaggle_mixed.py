"""DLRM on the Criteo Kaggle log, with tables of three dims and two optimizers.

  python main.py --config configs/criteo_kaggle_mixed.py \
    --config.data.train=train.txt

As configs/criteo_kaggle.py, but wide rows only where there is something to
learn about each (Ginart et al., Mixed Dimension Embeddings, 2019): the five
tables of over a million rows, most of which are seen a few times, have dim 8,
and the eleven of fewer than a thousand have dim 4 and an accumulator for each
element. With every id of the log a row, rows and slots take 1.23 GB instead of
2.30 GB. The model projects all of them to dim 16.
"""

from recjax.config import Config, TableRule


def get_config() -> Config:
  c = Config()
  c.data.format = "criteo"
  c.data.min_count = 2
  c.embedding.dim = 16
  c.embedding.optimizer = "rowwise_adagrad"
  c.embedding.learning_rate = 0.02
  c.embedding.rules = (
    TableRule(below_rows=1_000, dim=4, optimizer="adagrad"),
    TableRule(below_rows=1_000_000),  # as above
    TableRule(dim=8),
  )
  c.model.name = "dlrm"
  c.model.bottom = (512, 256, 64)
  c.model.top = (512, 256)
  c.train.batch_size = 128
  c.train.optimizer = "adagrad"
  c.train.learning_rate = 0.02
  c.train.decay_steps = 250  # without it the last steps' noise costs log loss
  return c
