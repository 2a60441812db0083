"""Blocks that several families share: functions of activations and loaded weights over `Ops`."""
