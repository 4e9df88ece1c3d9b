"""What departs from the paper, each by itself and off by default: see README.md."""
