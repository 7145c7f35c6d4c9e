"""The sections of gpu_suite.py, each of which measures one part of the product on one GPU."""
