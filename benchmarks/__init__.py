"""Measurements that README and docs quote; ``python -m benchmarks`` lists them."""
