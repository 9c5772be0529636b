"""Trains, evaluates and plans: python main.py --config configs/x.py."""

from recjax import cli

if __name__ == "__main__":
  cli.run()
