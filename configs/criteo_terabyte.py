"""MLPerf's DLRM-DCNv2 on the Criteo 1TB click logs (day_0 ... day_23).

  python main.py --config configs/criteo_terabyte.py \
    --config.data.train='/1tb/day_?,/1tb/day_1?,/1tb/day_2[0-2]' \
    --config.data.test=/1tb/day_23

dim 128, bottom 512-256-128, three cross layers of rank 512, top
1024-1024-512-256-1, batch 65,536. All 882,774,559 rows with Adagrad's slots
take 904 GB: see what your machines hold first. Before there is data, a plan is
made from the tables' sizes and an assumed exponent, for any cluster:

  python main.py --config configs/criteo_terabyte.py --mode=plan \
    --config.mesh.devices=64 --config.plan.topology=dgx_h200

MLPerf's target for this model (with its multi-hot data) is a test AUC of
0.80275; this config has not been run on the whole log yet.
"""

from recjax.config import Config


def get_config() -> Config:
  c = Config()
  c.data.format = "criteo"
  c.data.min_count = 1
  c.data.rows = (
    227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467,
    3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14, 292775614, 40790948,
    187188510, 590152, 12973, 108, 36,
  )  # fmt: skip
  c.embedding.dim = 128
  c.embedding.optimizer = "adagrad"
  c.embedding.learning_rate = 0.004
  c.model.name = "dcnv2"
  c.model.bottom = (512, 256)  # then the dim, 128
  c.model.top = (1_024, 1_024, 512, 256)
  c.model.cross_layers = 3
  c.model.cross_rank = 512
  c.model.compute_dtype = "bfloat16"
  c.train.batch_size = 65_536
  c.train.optimizer = "adagrad"
  c.train.learning_rate = 0.004
  c.checkpoint.every_steps = 5_000
  return c
