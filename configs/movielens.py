"""Will this user like this movie (rating >= 4)? DLRM on MovieLens-1M.

  python main.py --config configs/movielens.py
  python main.py --config configs/movielens.py --config.data.train=ml-1m

The first form downloads the data through tensorflow-datasets; the second reads
a local folder with ratings.dat (or ratings.tsv.gz), users.dat and movies.dat.
Three epochs take 15 s on 2 CPU cores and give a test AUC of 0.8079 (a random
tenth of the ratings is the test part).
"""

from recjax.config import Config


def get_config() -> Config:
  c = Config()
  c.data.format = "movielens"
  c.data.split = "random"  # the same users and movies on both sides
  c.data.test_fraction = 0.1
  c.data.pooling = "mean"  # of a movie's genres
  c.embedding.dim = 16
  c.embedding.optimizer = "rowwise_adagrad"
  c.embedding.learning_rate = 0.03
  c.model.bottom = ()  # no numeric inputs
  c.model.top = (64, 32)
  c.train.batch_size = 1_024
  c.train.epochs = 3
  c.train.optimizer = "adagrad"
  c.train.learning_rate = 0.02
  c.train.decay_steps = 500
  return c
