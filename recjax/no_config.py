"""The config of --mode=inspect where --config gives none: all defaults."""

from recjax.config import Config


def get_config() -> Config:
  return Config()
