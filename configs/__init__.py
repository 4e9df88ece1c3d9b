"""Presets: each file defines `get_config(arg)`; installed as `m2l2.configs`."""
